"""qjax: learn, measure and do weight quantization of language models, in JAX."""

import importlib
from typing import Any

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Affine, Format
from qjax.ops.linear import embed, explain_matmul, matmul
from qjax.tensor import QTensor, dequantize, quantize

__version__ = "0.1.0"

# Loaded when first used, with the libraries behind them: module and attribute, None for the module itself.
_LATER = {
    "Model": ("qjax.model", "Model"),
    "load": ("qjax.model", "load"),
    "perplexity": ("qjax.evaluate", "perplexity"),
    "kl_divergence": ("qjax.evaluate", "kl_divergence"),
    "imatrix": ("qjax.evaluate", "imatrix"),
    "check": ("qjax.soundness", "check"),
    "compare": ("qjax.comparison", "compare"),
    "train": ("qjax.train", None),
    "gguf": ("qjax.io.gguf", None),
    "data": ("qjax.data", None),
    "viz": ("qjax.viz", None),
}

__all__ = [
    "Affine", "Format", "Model", "QTensor", "QjaxError", "check", "compare", "data", "dequantize", "embed",
    "explain_matmul", "formats", "gguf", "imatrix", "kl_divergence", "load", "matmul", "perplexity", "quantize",
    "train", "viz",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'qjax' has no attribute {name!r}")
    module, attribute = _LATER[name]
    loaded = importlib.import_module(module)
    globals()[name] = value = getattr(loaded, attribute) if attribute else loaded
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
