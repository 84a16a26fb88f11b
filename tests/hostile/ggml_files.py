"""GGML files from before GGUF, written byte by byte, and such as are not what they say.

Source: the layout as published (llama.cpp convert_llama_ggml_to_gguf.py).
"""

import struct

import numpy as np
from hostile.kind import Kind

import qjax
from qjax.io import ggml_legacy

VOCAB, EMBD, HEADS, LAYERS, FF = 300, 64, 4, 2, 96
# Magic number, version, whether tokens have scores, and to what tensors are aligned.
FILES = {
    "GGML 1": (b"lmgg", None, False, 1),
    "GGMF 1": (b"fmgg", 1, True, 1),
    "GGJT 1": (b"tjgg", 1, True, 32),
    "GGJT 2": (b"tjgg", 2, True, 32),
    "GGJT 3": (b"tjgg", 3, True, 32),
}
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q6_K": 18}
# GGUF's names beside those of these files, said again.
NAMES = {
    "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output", "attn_norm": "attention_norm",
    "attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
    "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3", "ffn_norm": "ffn_norm",
}  # fmt: skip
# As the old converter wrote them: bytes as they are, three names in brackets, spaces, text that is no UTF-8.
TOKENS = [
    b"<unk>", b" \xe2\x81\x87 ", b"", *(bytes([i]) for i in range(256)), b" the", b"a b", b"\xff\xfe", b"",
    "\u00fc".encode(), *(f" t{i}".encode() for i in range(36)),
]  # fmt: skip


def shapes(kv_heads=HEADS, ff=FF):
    """By GGUF name."""
    kv = kv_heads * EMBD // HEADS
    layer = {
        "attn_norm": (EMBD,), "attn_q": (EMBD, EMBD), "attn_k": (kv, EMBD), "attn_v": (kv, EMBD),
        "attn_output": (EMBD, EMBD), "ffn_norm": (EMBD,), "ffn_gate": (ff, EMBD), "ffn_up": (ff, EMBD),
        "ffn_down": (EMBD, ff),
    }  # fmt: skip
    outside = {"token_embd": (VOCAB, EMBD), "output_norm": (EMBD,), "output": (VOCAB, EMBD)}
    return {f"{name}.weight": shape for name, shape in outside.items()} | {
        f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()
    }


def tensors(format="F32", **sizes):
    """Blocks at random: (GGUF name, shape, format, bytes)."""
    rng = np.random.default_rng(0)
    for name, shape in shapes(**sizes).items():
        of = qjax.formats.get("F32" if len(shape) == 1 else format)
        if of.name.startswith("F"):
            yield name, shape, of, rng.standard_normal(shape).astype(f"<f{of.type_size}").tobytes()
        else:
            yield name, shape, of, rng.bytes(of.nbytes(shape))


def old_name(name):
    *layer, inside, weight = name.replace("blk.", "layers.").rsplit(".", 2)
    return ".".join([*layer, NAMES[inside], weight])


def build(kind="GGJT 3", format="F32", *, numbers=None, tokens=TOKENS, listed=None, **sizes) -> bytes:
    magic, version, scores, alignment = FILES[kind]
    data = magic + (b"" if version is None else struct.pack("<I", version))
    numbers = numbers or (len(tokens), EMBD, 256, HEADS, LAYERS, EMBD // HEADS, FILE_TYPES.get(format, 1))
    data += struct.pack("<7I", *numbers)
    for i, token in enumerate(tokens):
        data += struct.pack("<I", len(token)) + token + (struct.pack("<f", -i / 8) if scores else b"")
    for name, shape, of, content in tensors(format, **sizes) if listed is None else listed:
        name = old_name(name).encode()
        data += struct.pack("<3I", len(shape), len(name), of.ggml_id)
        data += struct.pack(f"<{len(shape)}I", *reversed(shape)) + name
        data += bytes(-len(data) % alignment) + content
    return data


def readable(kind):
    """The formats that are read from a kind of file."""
    version = int(kind[-1]) if kind.startswith("GGJT") else 0
    return [
        "F32",
        "F16",
        *(["Q5_0", "Q5_1"] if version >= 2 else []),
        *(["Q4_0", "Q4_1", "Q8_0"] if version == 3 else []),
    ]


WHOLE = build()
HEADER = struct.pack("<3I", 2, 21, 0)
"""That of the first tensor: axes, length of the name, type; then columns and rows."""
SHAPE, NAME = struct.pack("<2I", EMBD, VOCAB), b"tok_embeddings.weight"


def first(new: bytes, old: bytes = HEADER) -> bytes:
    """The file with something else in the place of what stands in the header of the first tensor."""
    return WHOLE.replace(old, new, 1)


def named(name: bytes) -> bytes:
    return first(struct.pack("<3I", 2, len(name), 0) + SHAPE + name, HEADER + SHAPE + NAME)


def with_numbers(**changes) -> bytes:
    numbers = dict(vocab=VOCAB, embd=EMBD, mult=256, head=HEADS, layer=LAYERS, rot=EMBD // HEADS, ftype=0)
    return WHOLE[:8] + struct.pack("<7I", *(numbers | changes).values()) + WHOLE[36:]


def with_tensors(change) -> bytes:
    return build(listed=change(list(tensors())))


def typed(ggml_id: int) -> bytes:
    return first(struct.pack("<3I", 2, 21, ggml_id))


UNKNOWN = ("rope.freqs", "layers.0.attention.wq", "layers.00.attention.wq.weight", "norm.bias", "\x1b[2J", "\udcff")
BAD = {
    "version 4": (b"tjgg\4" + WHOLE[5:], "GGJT version 4, expected 1, 2, 3"),
    "GGMF 2": (b"fmgg" + struct.pack("<8I", 2, *[8] * 7), "GGMF version 2, expected 1"),
    "nothing": (b"", "the file is empty"),
    "another magic": (b"GGUF" + bytes(20), "not a GGML file from before GGUF: it begins with b'GGUF'"),
    # ── numbers
    "cut in the numbers": (WHOLE[:20], "the number head needs 4 bytes, the file has 0 left"),
    "no heads": (with_numbers(head=0), "64 columns in 0 heads of 16"),
    "5 heads": (with_numbers(head=5), "64 columns in 5 heads of 16.*Whisper"),
    "heads of 8": (with_numbers(rot=8), "64 columns in 4 heads of 8"),
    "no columns": (with_numbers(embd=0, rot=0), "0 columns in 4 heads of 0"),
    "columns 2^32-1": (with_numbers(embd=2**32 - 1, rot=2**32 - 1, head=1), "has shape|there is no matrix|expected"),
    "no tokens": (with_numbers(vocab=0), "0 tokens, expected 3 at least"),
    "tokens 2^32-1": (with_numbers(vocab=2**32 - 1), f"a vocabulary of {2**32 - 1} tokens needs {2**35 - 8} bytes"),
    "a token more": (with_numbers(vocab=VOCAB + 1), r"has \d+ dimensions"),
    "a token fewer": (with_numbers(vocab=VOCAB - 1), r"has \d+ dimensions"),
    "no layers": (with_numbers(layer=0), "n_layers is 0"),
    "layers 2^31": (with_numbers(layer=2**31), f"{2**31} layers, more than there are tensors"),
    "a layer more": (with_numbers(layer=3), "blk.2.attn_norm.weight is missing"),
    "a layer fewer": (with_numbers(layer=1), "blk.1.attn_norm.weight has shape .*expected none in 1 layers"),
    # ── vocabulary
    "a long token": (build(tokens=[b"x" * 5000, b"", b""]), "token 0 has 5000 bytes, expected at most 4095"),
    "cut in a token": (WHOLE[:39], "the length of token 0 needs 4 bytes, the file has 3 left|a vocabulary of"),
    # ── tensors
    "cut in a header": (WHOLE + HEADER[:7], "the header of a tensor needs 4 bytes, the file has 3 left"),
    "cut in the data": (WHOLE[:-1], "layers.1.feed_forward.w2.weight.*needs 24576 bytes, the file has 24575 left"),
    "three dimensions": (first(struct.pack("<3I", 3, 21, 0)), "has 3 dimensions, expected 1 or 2"),
    "no dimensions": (first(struct.pack("<3I", 0, 21, 0)), "has 0 dimensions, expected 1 or 2"),
    "a long name": (first(struct.pack("<3I", 2, 2**31, 0)), f"name of a tensor has {2**31} bytes"),
    **{f"the name {name!r}": (named(name.encode(errors="surrogateescape")), "no such tensor") for name in UNKNOWN},
    "a name twice": (with_tensors(lambda t: [("blk.0.attn_q.weight", *t[0][1:]), *t]), "occurs twice"),
    "type -1": (typed(2**32 - 1), "unknown tensor type id 4294967295"),
    "type removed": (typed(4), "Q4_2 blocks of a GGJT 3 file.*given up"),
    "type younger": (typed(30), "BF16 is younger than such files"),
    "row of no whole blocks": (typed(14), "tok_embeddings.*row length 64 is not a multiple of 256"),
    "a tensor missing": (with_tensors(lambda t: t[1:]), "token_embd.weight"),
    "no tensors": (build(listed=[]), "2 layers, more than there are tensors"),
    "a part of a model": (
        with_tensors(lambda t: [(n, (s[0] // 2, *s[1:]), f, d[: len(d) // 2]) for n, s, f, d in t]),
        "has shape .*bin.1",
    ),
    "a large tensor": (
        first(struct.pack("<2I", 2**32 - 1, 2**32 - 1), SHAPE),
        f"tok_embeddings.weight' needs {4 * (2**32 - 1) ** 2} bytes",
    ),
    # ── blocks that were laid out otherwise then
    **{
        f"{format} in {kind}": (
            build(kind, format),
            rf".*tok_embeddings.*{format} blocks of a {kind} .*GGJT {2 if format.startswith('Q5') else 3}.*float16",
        )
        for kind in FILES
        for format in ("Q4_0", "Q4_1", "Q8_0", "Q5_0", "Q5_1")
        if format not in readable(kind)
    },
}

KIND = Kind(ggml_legacy.read, "model.bin", {kind: build(kind) for kind in FILES}, BAD)
