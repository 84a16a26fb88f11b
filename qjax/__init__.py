"""qjax: learn, measure and do weight quantization of language models, in JAX."""

from qjax import formats
from qjax.errors import QjaxError
from qjax.formats import Affine, Format
from qjax.ops.linear import embed, matmul
from qjax.tensor import dequantize, QTensor, quantize

__version__ = "0.1.0"

__all__ = ["Affine", "Format", "QTensor", "QjaxError", "dequantize", "embed", "formats", "matmul", "quantize"]
