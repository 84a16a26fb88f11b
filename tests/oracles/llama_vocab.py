"""llama.cpp's tokenizer, called in libllama.so with the vocabulary of a GGUF file: thousands of texts a second."""

import ctypes
import functools
from pathlib import Path

import numpy as np

from qjax.io import gguf


class _ModelParams(ctypes.Structure):
    """llama.h llama_model_params, of llama.cpp b9570 (libllama 0.5)."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, ctypes.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, ctypes.c_void_p) for name in ("tensor_split", "progress_callback", "user_data", "kv_overrides")),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host")),
        *((name, ctypes.c_bool) for name in ("no_alloc", "load_mtp")),
    )


@functools.cache
def _library(folder: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(folder / "libllama.so"))
    for name, result, *arguments in (
        ("llama_backend_init", None),
        ("llama_log_set", None, ctypes.c_void_p, ctypes.c_void_p),
        ("llama_model_default_params", _ModelParams),
        ("llama_model_load_from_file", ctypes.c_void_p, ctypes.c_char_p, _ModelParams),
        ("llama_model_free", None, ctypes.c_void_p),
        ("llama_model_get_vocab", ctypes.c_void_p, ctypes.c_void_p),
        ("llama_vocab_n_tokens", ctypes.c_int32, ctypes.c_void_p),
        ("llama_vocab_is_eog", ctypes.c_bool, ctypes.c_void_p, ctypes.c_int32),
        (
            *("llama_tokenize", ctypes.c_int32, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32),
            *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ),
        (
            *("llama_detokenize", ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32),
            *(ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ),
    ):
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    _library.silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
    library.llama_log_set(_library.silent, None)
    return library


class Vocabulary:
    """The vocabulary of a GGUF file, or of metadata written to ``path``, as llama.cpp understands it."""

    def __init__(self, folder: Path, path: Path, metadata=None):
        if metadata is not None:
            gguf.write(path, {"general.architecture": "llama"} | dict(metadata), {})
        self._library = _library(folder)
        params = self._library.llama_model_default_params()
        params.vocab_only = True
        self._model = self._library.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, f"llama.cpp does not load {path.name}"
        self._vocab = self._library.llama_model_get_vocab(self._model)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._library.llama_model_free(self._model)

    def encode(self, text: str, add_special: bool = True, parse_special: bool = False) -> list[int]:
        data = text.encode()
        ids = np.empty(2 * len(data) + 8, np.int32)
        arguments = ids.ctypes.data, len(ids), add_special, parse_special
        count = self._library.llama_tokenize(self._vocab, data, len(data), *arguments)
        assert count >= 0
        return ids[:count].tolist()

    def decode(self, ids: list[int], unparse_special: bool = True) -> bytes:
        array = np.array(ids, np.int32)
        text = ctypes.create_string_buffer(64 * len(ids) + 256)
        arguments = text, len(text), False, unparse_special
        count = self._library.llama_detokenize(self._vocab, array.ctypes.data, len(array), *arguments)
        assert count >= 0
        return text.raw[:count]

    def eog_ids(self) -> frozenset[int]:
        count = self._library.llama_vocab_n_tokens(self._vocab)
        return frozenset(id for id in range(count) if self._library.llama_vocab_is_eog(self._vocab, id))
