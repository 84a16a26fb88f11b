"""What quantization lost: a logits function and token arrays in, frozen records out."""

from qjax.metrics.divergence import KLDivergence, TokenDivergence, cached, token_divergence
from qjax.metrics.perplexity import Logits, Perplexity, token_nll, windows
from qjax.metrics.probes import ProbeResult, ask, likelihoods
from qjax.metrics.tensors import TensorError, tensor_error

__all__ = [
    "KLDivergence",
    "Logits",
    "Perplexity",
    "ProbeResult",
    "TensorError",
    "TokenDivergence",
    "ask",
    "cached",
    "likelihoods",
    "tensor_error",
    "token_divergence",
    "token_nll",
    "windows",
]
