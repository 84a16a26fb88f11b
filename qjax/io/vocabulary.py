"""Facts about byte-level BPE vocabularies as llama.cpp knows them: tables only, no behaviour.

Source: llama.cpp src/llama-vocab.cpp (llm_tokenizer_bpe, llama_vocab::impl::load).
"""

from enum import IntEnum
from typing import NamedTuple


class TokenType(IntEnum):
    """The numbers in tokenizer.ggml.token_type (llama.h, llama_token_type)."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    """Structure of a prompt, such as <|im_start|>; found in a text only if asked for (parse_special)."""
    USER_DEFINED = 4
    """Found in text always, before any pre-tokenizer sees it."""
    UNUSED = 5
    BYTE = 6


class PreTokenizer(NamedTuple):
    """How text is cut into words before BPE merges within each word."""

    names: tuple[str, ...]
    """The values of tokenizer.ggml.pre that mean this; the first is the one written."""
    splits: tuple[str, ...]
    """Regular expressions applied in turn; each cuts every piece into its matches and what lies between."""
    ignore_merges: bool = False
    """A word that is itself a token stays whole, whatever the merges say."""
    add_bos: bool = False
    """Whether a text begins with BOS where the file does not say (tokenizer.ggml.add_bos_token)."""


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
"""Whitespace left over between matches is a word too, so GPT-2's last alternative, \\s+, is not needed."""

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""llama.cpp's spelling of (?i:'s|'t|'re|'ve|'m|'ll|'d), which unlike it leaves the long ſ alone."""

_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_OTHERS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

PRE_TOKENIZERS = (
    PreTokenizer(
        names=("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum"),
        splits=(GPT2,),
    ),
    PreTokenizer(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        splits=(r"\p{N}", GPT2),
    ),
    PreTokenizer(
        names=("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        splits=(rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}",),
        ignore_merges=True,
        add_bos=True,
    ),
    # Qwen's tokenizer.json also normalizes to NFC. GGUF has no place for that and llama.cpp does without.
    PreTokenizer(
        names=(
            "qwen2",
            "deepseek-r1-qwen",
            "kormo",
            "f2llmv2",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
        ),
        splits=(rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_OTHERS}",),
    ),
    # What llama.cpp falls back to, under a loud warning, in files from before tokenizer.ggml.pre existed.
    PreTokenizer(
        names=("default",),
        splits=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
)

# fmt: off
END_OF_GENERATION = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|eom_id|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "</s>", "<eos>", "[EOS]",
    "<EOT>", "_<EOT>", "[EOT]", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
    "<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]",
    "<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>",
})
"""Tokens with these texts end a generation, and are CONTROL whatever the file says."""

FILL_IN_MIDDLE = frozenset({
    "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
    "<|prefix|>", "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>",
    "<|code_suffix|>", "<|suffix|>", "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>",
    "<MID>", "▁<MID>", "<|code_middle|>", "<|middle|>",
})
"""Tokens with these texts are CONTROL whatever the file says."""
# fmt: on

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REMAPPED = (byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_REMAPPED)}
"""The byte that each character of a NORMAL token stands for: itself where printable, else moved to U+0100 on
(GPT-2's encoder.py, bytes_to_unicode), so that a space is written Ġ."""
