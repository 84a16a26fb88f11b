"""Files of predictions, as llama-perplexity writes them, that are not what they say."""

import struct

import numpy as np
from hostile.kind import Kind

from qjax.io import logits

N_CTX, VOCAB, CHUNKS = 32, 257, 3
ROWS = CHUNKS * (N_CTX - N_CTX // 2 - 1)


def build(n_ctx=N_CTX, vocab=VOCAB, chunks=CHUNKS, *, magic=b"_logits_", first=0, n_bytes=None) -> bytes:
    """Predictions of nothing; first: the first token.  n_bytes: after the header, if not what it says."""
    tokens = np.array([first, *range(1, CHUNKS * N_CTX)], "<i4").tobytes()
    data = tokens + bytes(2 * ROWS * (4 + VOCAB + VOCAB % 2))
    return magic + struct.pack("<3i", n_ctx, vocab, chunks) + data[:n_bytes]


BAD = {
    "nothing": (b"", "0 bytes are no file of predictions"),
    "19 bytes": (build()[:19], "19 bytes are no file of predictions"),
    "a GGUF file": (b"GGUF" + bytes(40), r"begins with b'GGUF.*--kl-divergence-base FILE"),
    "another magic": (build(magic=b"_logitz_"), r"begins with b'_logitz_'.*--kl-divergence-base FILE"),
    "a number missing": (build()[:-2], "for 3 chunks of 32 tokens and a vocabulary of 257. It was not written to"),
    "a byte more": (build() + b"\0", "expected .* for 3 chunks"),
    "the header alone": (build(n_bytes=0), "20 bytes, expected .* for 3 chunks"),
    "n_ctx 2^31-1": (build(n_ctx=2**31 - 1), "bytes, expected .* for 3 chunks of 2147483647 tokens"),
    "vocabulary 2^31-1": (build(vocab=2**31 - 1), "bytes, expected .* and a vocabulary of 2147483647"),
    "chunks 2^31-1": (build(chunks=2**31 - 1), "bytes, expected .* for 2147483647 chunks"),
    "all 2^31-1": (build(*[2**31 - 1] * 3), "bytes, expected .* for 2147483647 chunks of 2147483647 tokens"),
    "n_ctx 2": (build(n_ctx=2), "n_ctx 2, vocabulary 257, chunks 3: the file is damaged"),
    "n_ctx -32": (build(n_ctx=-32), "n_ctx -32, vocabulary"),
    "vocabulary -1": (build(vocab=-1), "vocabulary -1"),
    "no chunks": (build(chunks=0), "chunks 0"),
    "-3 chunks": (build(chunks=-3), "chunks -3"),
    "a token beyond the vocabulary": (build(first=257), "tokens from .* to 257, expected 0 to 256"),
    "token -5": (build(first=-5), "tokens from -5"),
    "token -2^31": (build(first=-(2**31)), "tokens from -2147483648"),
}

KIND = Kind(logits.read, "base.kld", {"of nothing": build()}, BAD)
