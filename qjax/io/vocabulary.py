"""Facts about BPE vocabularies as llama.cpp knows them: tables only, no behaviour.

Source: llama.cpp src/llama-vocab.cpp (llm_tokenizer_bpe, llama_vocab::impl::load) and src/unicode.cpp. The regular
expressions mean there what they mean to its own splitter: all letters are of one kind, for example.
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
    original: tuple[str, ...] = ()
    """The same in the model's tokenizer.json, where llama.cpp has other regular expressions."""
    byte_level: bool = True
    """Whether BPE begins with bytes, spelled as in `BYTE_OF`; else with characters, a space being `SPACE`."""


SPACE = "▁"
"""U+2581, what SentencePiece writes for a space."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
"""Whitespace left over between matches is a word too, so GPT-2's last alternative, \\s+, is not needed."""

CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
"""llama.cpp's spelling of (?i:'s|'t|'re|'ve|'m|'ll|'d), which unlike it leaves the long ſ alone."""

PUNCTUATION = r"[\p{P}\$\+<=>\^~\|`]+"
"""Runs of what the tokenizers library calls punctuation."""

# What many of them are made of: words, numbers, and the rest as punctuation, line ends, blanks.
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_LETTERS_AND_MARKS = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_OTHERS = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BLANKS}"
_OTHERS_AND_SLASH = rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BLANKS}"
_LLAMA3 = rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_OTHERS}"
_QWEN2 = rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_OTHERS}"
_LINES = r"[^\n]+|\n+"
# Of the letters only a-z and A-Z have a case, for llama.cpp: the others may stand in both halves of a word.
_UPPER, _LOWER = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"
_UPPER_M, _LOWER_M = r"[\p{L}\p{M}&&[^a-z]]", r"[\p{L}\p{M}&&[^A-Z]]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_GPT4O = rf"{_BEFORE}{_UPPER}*{_LOWER}+{CONTRACTIONS}?|{_BEFORE}{_UPPER}+{_LOWER}*{CONTRACTIONS}?"
# How tokenizer.json spells the halves of a word, and such words.
_TITLE, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_WORDS = rf"{_BEFORE}{_TITLE}*{_SMALL}+{CONTRACTIONS}?|{_BEFORE}{_TITLE}+{_SMALL}*{CONTRACTIONS}?"
_PUNCTUATED = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
)
_KANJI_KANA = "[一-龥぀-ゟ゠-ヿ]+"
_HAN = r"\x{4E00}-\x{9FFF}\x{3400}-\x{4DBF}\x{20000}-\x{2A6DF}\x{2A700}-\x{2EBEF}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}"
# Groups of three from the right. What stands before a number stays with its first group (unicode.cpp, afmoe).
_THREES = r"[^\p{N}]*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
# Letters that have a case, and then letters that have none (DeepSeek's ranges; blanks are not in them).
_CASED = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝ"
    r"Ὗ-\x{1F7D}ᾀ-ᾴᾶ-ᾼ\x{1FBE}ῂ-ῄῆ-ῌῐ-\x{1FD3}ῖ-\x{1FDB}ῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤ\x{2126}ℨ\x{212A}-ℭℯ-ℴℹℼ-ℿⅅ"
    r"-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_UNCASED = r"[[\x{0800}-\x{9FA5}\x{AC00}-\x{D7FF}]&&[^\s]]+"

PRE_TOKENIZERS = (
    PreTokenizer(
        names=(
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "mellum"),
            *("jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en", "jina-v2-code", "roberta-bpe"),
            *("a.x-4.0", "modern-bert", "exaone4"),
        ),
        splits=(GPT2,),
    ),
    PreTokenizer(
        names=("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        splits=(r"\p{N}", GPT2),
    ),
    PreTokenizer(
        names=(
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
        splits=(_LLAMA3,),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(names=("dbrx", "smaug-bpe", "chatglm-bpe"), splits=(_LLAMA3,)),
    PreTokenizer(names=("glm4", "glm5"), splits=(_LLAMA3,), ignore_merges=True),
    PreTokenizer(
        names=(
            *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
            "grok-2",
        ),
        splits=(_QWEN2,),
    ),
    PreTokenizer(
        names=("qwen35",),
        splits=(rf"{CONTRACTIONS}|{_LETTERS_AND_MARKS}|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_BLANKS}",),
    ),
    PreTokenizer(names=("laguna",), splits=(_LINES, _QWEN2)),
    PreTokenizer(names=("ufakzeka",), splits=(rf"{_LETTERS}|\p{{N}}|{_OTHERS}",)),
    PreTokenizer(
        names=("minicpm5",),
        splits=(r"\p{N}{1,3}", rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}+|{_OTHERS}"),
        ignore_merges=True,
    ),
    PreTokenizer(
        names=("seed-coder",),
        splits=(rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{_BLANKS}",),
    ),
    PreTokenizer(
        names=("bailingmoe", "bailingmoe2", "llada-moe"),
        splits=(_QWEN2,),  # Its own amounts to the same.
        original=(
            r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|"
            r"\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer(
        names=("exaone-moe",),
        splits=(
            rf"{CONTRACTIONS}|{_BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
        ),
    ),
    PreTokenizer(
        names=("jais-2",),
        splits=(
            rf"{CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|"
            + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"\s{1,2}(?!\S)|\s{1}",
        ),
    ),
    PreTokenizer(
        names=("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        splits=(rf"{_GPT4O}|\p{{N}}{{1,3}}|{_OTHERS_AND_SLASH}",),
        original=(rf"{_CASED_WORDS}|\p{{N}}{{1,3}}|{_OTHERS_AND_SLASH}",),
    ),
    PreTokenizer(
        names=("granite-embed-multi-97m",),
        splits=(
            rf"{_BEFORE}{_UPPER_M}*{_LOWER_M}+{CONTRACTIONS}?|{_BEFORE}{_UPPER_M}+{_LOWER_M}*{CONTRACTIONS}?|"
            rf"\p{{N}}{{1,3}}|{_OTHERS_AND_SLASH}",
        ),
        ignore_merges=True,
    ),
    PreTokenizer(
        names=("tekken",),
        splits=(rf"{_BEFORE}{_UPPER}*{_LOWER}+|{_BEFORE}{_UPPER}+{_LOWER}*|\p{{N}}|{_OTHERS_AND_SLASH}",),
        original=(rf"{_BEFORE}{_TITLE}*{_SMALL}+|{_BEFORE}{_TITLE}+{_SMALL}*|\p{{N}}|{_OTHERS_AND_SLASH}",),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(
        names=("tiny_aya", "cohere2moe"),
        splits=(_THREES, rf"{_LETTERS_AND_MARKS}{CONTRACTIONS}?|\p{{N}}{{1,3}}|{_OTHERS_AND_SLASH}"),
        original=(r"\d{1,3}(?=(?:\d{3})*\b)", rf"{_CASED_WORDS}|\p{{N}}{{1,3}}|{_OTHERS_AND_SLASH}"),
    ),
    PreTokenizer(
        names=("youtu",),
        splits=(
            rf"[가-힣ㄱ-ㆎ]+|[！…“”‘’—：；，、-〿︰-﹏]+|[ㄅ-ㄯ]+|{_KANJI_KANA}",
            rf"{_LETTERS_AND_MARKS}{CONTRACTIONS}?|\p{{N}}|{_OTHERS_AND_SLASH}",
        ),
        ignore_merges=True,
    ),
    PreTokenizer(
        names=("kimi-k2",),
        splits=(rf"[{_HAN}]+|{_BEFORE}[\p{{L}}&&[^{_HAN}]]+{CONTRACTIONS}?|\p{{N}}{{1,3}}|{_OTHERS}",),
    ),
    PreTokenizer(
        names=("deepseek-llm",),
        splits=(
            r"[\r\n]",
            rf"\s?[{_CASED}]+",
            r"\s?[!-/:-~！-／：-～‘-‟、-。]+",
            r"\s+\z",
            _UNCASED,
            r"\p{N}+",
        ),
    ),
    PreTokenizer(
        names=("deepseek-coder",),
        splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _UNCASED, r"\p{N}"),
    ),
    PreTokenizer(
        names=("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        splits=(r"\p{N}{1,3}", _KANJI_KANA, rf"{_PUNCTUATED}[\r\n]*|{_BLANKS}"),
    ),
    PreTokenizer(
        names=("spark2_5",), splits=(r"\p{N}{1,3}", _KANJI_KANA, rf"{_PUNCTUATED}|[\r\n]|\s+(?!\S)|\s+", r"\p{N}")
    ),
    PreTokenizer(
        names=("afmoe",),
        splits=(
            _THREES,
            "[一-鿿㐀-䶿豈-\\x{FAFF}\\x{3040}-ゟ゠-ヿ･-ﾟ⼀-\\x{2FDF}เ-\\x{0E7F}\\x{0E80}-\\x{0EFF}ក-\\x{17FF}"
            "က-႟ꩠ-ꩿꧠ-\\x{A9FF}가-\\x{D7AF}ᄀ-ᇿ]+",
            rf"{_PUNCTUATED}[\r\n]*|{_BLANKS}",
        ),
    ),
    PreTokenizer(
        names=("falcon",),
        splits=(PUNCTUATION, GPT2, "[0-9][0-9][0-9]"),
        original=(PUNCTUATION, GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
    PreTokenizer(
        names=("poro-chat", "bloom", "gpt3-finnish"),
        splits=(r" ?[^(\s|.,!?…。，、।۔،)]+",),
        original=(r" ?[^(\s|[.,!?…。，、।۔،])]+",),
    ),
    PreTokenizer(
        names=("viking",),
        splits=(r" ?[^(\s|.,!?…。，、।۔،)]+", r"\p{N}"),
        original=(r" ?[^(\s|[.,!?…。，、।۔،])]+", r"\p{N}"),
    ),
    PreTokenizer(
        names=("superbpe",),
        splits=(r"\p{N}+", "(?=([0-9]{3})+(?![0-9]))"),
        original=(r"\p{N}+", r"(?=(\d{3})+(?!\d))"),
    ),
    PreTokenizer(
        names=("chameleon",),
        splits=(
            "<sentinel:[0-9]+>",
            "IMGIMG[A-I]{1,4}Z",
            r"[\t\n]|    |  ",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            GPT2,
        ),
        add_bos=True,
    ),
    # Gemma 4 and its kind: merges as in BPE, over characters as in SentencePiece, across words.
    PreTokenizer(names=("gemma4", "granite-embed-multi-311m"), splits=(_LINES,), add_bos=True, byte_level=False),
    PreTokenizer(names=("sarvam-moe",), splits=(_LINES,), byte_level=False),
    # What llama.cpp falls back to, under a loud warning, in files from before tokenizer.ggml.pre existed.
    PreTokenizer(
        names=("default",),
        splits=(r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    ),
)

SENTENCEPIECE = PreTokenizer(names=("default",), splits=(), add_bos=True, byte_level=False)
"""tokenizer.ggml.model "llama": pairs merge by the score of the token they make, across words."""

LATER_CHARACTERS = (
    "897 1B4E-1B4F 1B7F 1C89-1C8A 2427-2429 31E4-31E5 A7CB-A7CD A7DA-A7DC 105C0-105F3 10D40-10D8F 10EC2-10EFC "
    "11380-113E2 116D0-116E3 11BC0-11BF9 11F5A 13460-143FA 16100-16139 16D40-16D79 18CFF 1CC00-1CEB3 1E5D0-1E5FF "
    "1F8B2-1F8C1 1FA89-1FA8F 1FABE 1FAC6 1FADC-1FADF 1FAE9 1FBCB-1FBEF"
)
"""Hexadecimal ranges with what Unicode 16 added (DerivedAge.txt). llama.cpp knows Unicode 15.1 (unicode-data.cpp):
to it these are no letters, marks, numbers, punctuation or symbols."""

# fmt: off
END_OF_GENERATION = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|calls|>", "<|flush|>", "<|eom_id|>",
    "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "<end_of_utterance>", "</s>", "<eos>", "[EOS]",
    "<EOT>", "_<EOT>", "[EOT]", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
})
"""Tokens with these texts end a generation, and are CONTROL whatever the file says."""

FILL_IN_MIDDLE = {
    "fim_pre": {
        "<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>", "<|code_prefix|>",
        "<|prefix|>",
    },
    "fim_suf": {
        "<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>", "<|code_suffix|>",
        "<|suffix|>",
    },
    "fim_mid": {
        "<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>", "<|code_middle|>",
        "<|middle|>",
    },
    "fim_pad": {"<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"},
    "fim_rep": {"<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"},
    "fim_sep": {"<|file_sep|>"},
}
"""Tokens with these texts are CONTROL, and what tokenizer.ggml.<name>_token_id names if the file does not."""

HARMONY = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>")
"""Tokens of gpt-oss with these texts are USER_DEFINED whatever the file says."""
# fmt: on

_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_REMAPPED = (byte for byte in range(256) if byte not in _PRINTABLE)

BYTE_OF = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_REMAPPED)}
"""The byte that each character of a NORMAL token stands for: itself where printable, else moved to U+0100 on
(GPT-2's encoder.py, bytes_to_unicode), so that a space is written Ġ."""
