"""The formats without blocks: floats and integers as they are."""

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax.errors import QjaxError
from qjax.formats._format import Field, Format, get, is_finite, names, register


class Plain(Format):
    """One element a block, stored as ``dtype``."""

    family = "plain"
    block_size = 1
    dtype: ClassVar[str]

    @property
    def layout(self) -> tuple[Field, ...]:
        return (Field("values", self.dtype),)

    @property
    def activations(self):
        return self.name if self.for_weights else None

    def encode(self, weights, importance=None, rounding=None, seed=0):
        return self.Fields(weights[..., 0].astype(self.dtype))

    def decode(self, fields):
        return fields.values.astype(jnp.float32)[..., None]


@register
class F32(Plain):
    """IEEE binary32."""

    name, ggml_id, dtype = "F32", 0, "float32"


@register
class F16(Plain):
    """IEEE binary16; the nearest even value, beyond 65504 infinity."""

    name, ggml_id, dtype = "F16", 1, "float16"


@register
class BF16(Plain):
    """The upper half of binary32, rounded to nearest even (ggml-impl.h ggml_compute_fp32_to_bf16)."""

    name, ggml_id, dtype = "BF16", 30, "bfloat16"

    def encode(self, weights, importance=None, rounding=None, seed=0):
        # On the bits, because XLA's conversion flushes denormals and chooses its own NaN.
        u = lax.bitcast_convert_type(weights[..., 0], jnp.uint32)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        quiet_nan = (u >> 16) | 0x40
        bits = jnp.where((u & 0x7FFFFFFF) > 0x7F800000, quiet_nan, rounded).astype(jnp.uint16)
        return self.Fields(lax.bitcast_convert_type(bits, jnp.bfloat16))


class Integer(Plain):
    """Integers, found in files beside the weights; nothing is quantized to them."""

    family, encodable, for_weights = "integer", False, False

    def encode(self, weights, importance=None, rounding=None, seed=0):
        raise QjaxError(f"{self.name} holds integers and has no quantizer. Use Q8_0 or Affine(bits=8).")


@register
class I8(Integer):
    name, ggml_id, dtype = "I8", 24, "int8"


@register
class I16(Integer):
    name, ggml_id, dtype = "I16", 25, "int16"


@register
class I32(Integer):
    name, ggml_id, dtype = "I32", 26, "int32"


class Wide(Plain):
    """64-bit numbers: JAX reads them only with jax_enable_x64."""

    family, encodable, for_weights = "wide", False, False

    def encode(self, weights, importance=None, rounding=None, seed=0):
        raise QjaxError(f"{self.name} is read and copied, not written. Use F32.")

    def unpack(self, data):
        if not jax.config.read("jax_enable_x64"):
            raise QjaxError(f"{self.name} needs 64-bit JAX: set the environment variable JAX_ENABLE_X64=1")
        return super().unpack(data)


@register
class I64(Wide):
    name, ggml_id, dtype = "I64", 27, "int64"


@register
class F64(Wide):
    name, ggml_id, dtype = "F64", 28, "float64"

    def valid(self, fields):
        with np.errstate(all="ignore"):
            return is_finite(fields.values.astype(np.float32))  # what a weight becomes


def plain_format(dtype) -> Format:
    """The format that stores ``dtype`` as it is.  Raises QjaxError if there is none."""
    for format in map(get, names()):
        if isinstance(format, Plain) and format.dtype == jnp.dtype(dtype).name:
            return format
    raise QjaxError(f"dtype {jnp.dtype(dtype).name} has no GGUF type. Convert it to float32.")
