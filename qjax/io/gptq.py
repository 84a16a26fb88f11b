"""GPTQ and AWQ in safetensors: several tensors for the weight "w.weight" of a linear layer, of shape (d_out, d_in).

               GPTQ                               AWQ (its version gemm)
    w.qweight  int32 (d_in·bits/32, d_out)        int32 (d_in, d_out·bits/32)      codes
    w.qzeros   int32 (n_groups, d_out·bits/32)    int32 (n_groups, d_out·bits/32)  zero points
    w.scales   floats (n_groups, d_out)           floats (n_groups, d_out)
    w.g_idx    int32 (d_in,)                      –                                the group of each column

A weight is (code - zero point) · scale of its group.  Codes and zero points lie in the words as one stream, least
significant bit first: GPTQ's codes go down the columns, everything else along the rows.  AWQ has the eight codes of a
word in another order.  GPTQ's first format stores zero points less one, modulo 2^bits; gptq_v2 as they are.

The stream down a column is that of a row of `Affine`, whose bytes are therefore taken as they come.
Sources: AutoGPTQ nn_modules/qlinear, GPTQModel nn_modules/qlinear (pack, dequantize_weight) and utils/model_dequant.py
(the +1), AutoAWQ awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import QjaxError
from qjax.formats import Affine, Format, plain_format
from qjax.io.raw_tensor import RawTensor
from qjax.tensor import QTensor

CODES, ZEROS, SCALES, GROUPS = "qweight", "qzeros", "scales", "g_idx"
PARTS = (CODES, ZEROS, SCALES, GROUPS)
"""What follows the name of the layer."""

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which code of a word's eight lies in each of its nibbles, the lowest first."""

_WORD = 32
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}


class Groups(NamedTuple):
    """How all layers of a model are stored."""

    name: str
    bits: int
    down: bool
    """Whether words of codes hold several input columns of one output, rather than several outputs of one column."""
    order: tuple[int, ...] | None = None
    """Of the codes in a word, if it is not the natural one."""
    less_one: bool = False
    """Whether zero points are stored less one."""

    @property
    def label(self) -> str:
        return f"{self.name} of {self.bits} bits"

    def part(self, name: str, dtype: str) -> str | None:
        """Which part of a layer the tensor called ``name`` is; None if it is none."""
        part = name.rpartition(".")[2]
        return part if part in PARTS else None

    def describe(self, parts: Mapping[str, RawTensor]) -> tuple[tuple[int, ...], Format]:
        """Shape and format of the weight.

        The format is an Affine with zero points, which has the same weights.  It takes groups of one size that lie side
        by side; where columns were quantized in the order of their activations (desc_act) they do not, and then the
        weights are floats, of the type of the scales and rounded to it.

        Raises QjaxError if parts are missing, of another type or shape, or contradict each other.
        """
        d_in = self._check(parts)
        n_groups, d_out = parts[SCALES].shape
        dtype = _FLOATS[parts[SCALES].dtype]
        size = d_in // n_groups
        side_by_side = d_in % n_groups == 0 and size * self.bits % 8 == 0
        groups = parts[GROUPS].read() if GROUPS in parts else None
        if groups is not None and not 0 <= groups.min() <= groups.max() < n_groups:
            found = f"{groups.min()} to {groups.max()}"
            raise QjaxError(f"the part {GROUPS} names groups {found}, expected 0 to {n_groups - 1}")
        if side_by_side and (groups is None or np.array_equal(groups, np.arange(d_in) // size)):
            format = Affine(bits=self.bits, block_size=size, symmetric=False, zero_point=True, scale_dtype=dtype)
        elif groups is None:
            raise QjaxError(f"{d_in} columns do not divide into {n_groups} groups, and there is no {GROUPS}")
        else:
            format = plain_format(dtype)
        return (d_out, d_in), format

    def weight(self, parts: Mapping[str, RawTensor], format: Format) -> QTensor | Array:
        """The weight, in the format that `describe` gave."""
        codes, scales, zeros = parts[CODES].read(), parts[SCALES].read(), self._unpack(parts[ZEROS].read())
        if self.less_one:
            zeros = (zeros + np.uint8(1)) & np.uint8(2**self.bits - 1)
        if isinstance(format, Affine):
            stream = codes.T if self.down else _pack_bytes(self._unpack(codes).T, self.bits)
            qs = np.ascontiguousarray(stream).view(np.uint8).reshape(len(stream), len(scales), -1)
            fields = format.Fields(*map(np.ascontiguousarray, (scales.T, zeros.T)), qs)
            return jax.tree.map(jnp.asarray, QTensor(fields, format))
        codes, groups = self._unpack(codes.T).T if self.down else self._unpack(codes), parts[GROUPS].read()
        steps = codes.astype(np.int16) - zeros.astype(np.int16)[groups]
        weights = steps.astype(np.float32) * scales.astype(np.float32)[groups]
        return jnp.asarray(weights.T.astype(scales.dtype))

    def _check(self, parts: Mapping[str, RawTensor]) -> int:
        """The number of input columns."""
        if missing := [part for part in PARTS[:3] if part not in parts]:
            raise QjaxError(f"the part {missing[0]} of the {self.name} layer is missing")
        for name, part in parts.items():
            known, n_axes = (_FLOATS if name == SCALES else ("I32",)), 1 if name == GROUPS else 2
            if part.dtype not in known or len(part.shape) != n_axes or 0 in part.shape:
                expected = f"{' or '.join(known)} with {n_axes} axes"
                raise QjaxError(f"the part {name} is {part.dtype}{list(part.shape)}, expected {expected}, none empty")
        n_groups, d_out = parts[SCALES].shape
        n_words = parts[CODES].shape[0]
        d_in, words = n_words * _WORD // self.bits if self.down else n_words, d_out * self.bits // _WORD
        expected = {
            CODES: (d_in * self.bits // _WORD, d_out) if self.down else (d_in, words),
            ZEROS: (n_groups, words),
            GROUPS: (d_in,),
        }
        differ = any(parts[name].shape != shape for name, shape in expected.items() if name in parts)
        if differ or d_out * self.bits % _WORD or n_groups > d_in:
            found = ", ".join(f"{name} {list(part.shape)}" for name, part in parts.items())
            raise QjaxError(f"the parts of the {self.name} layer contradict each other at {self.bits} bits: {found}")
        return d_in

    def _unpack(self, words: np.ndarray) -> np.ndarray:
        """The codes, uint8, in words (rows, n) of int32, each row a stream."""
        stream, bits = np.ascontiguousarray(words).view(np.uint8), self.bits
        if 8 % bits == 0:
            codes = stream[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & np.uint8(2**bits - 1)
        else:
            singly = np.unpackbits(stream, axis=1, bitorder="little")
            codes = np.packbits(singly.reshape(len(words), -1, bits), axis=2, bitorder="little")
        if self.order is not None:
            codes = codes.reshape(len(words), -1, len(self.order))[..., np.argsort(self.order)]
        return codes.reshape(len(words), -1)


def _pack_bytes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (rows, n) in the natural order to bytes, for bits that divide 8."""
    shifted = codes.reshape(len(codes), -1, 8 // bits) << np.arange(0, 8, bits, dtype=np.uint8)
    return np.bitwise_or.reduce(shifted, axis=-1)
