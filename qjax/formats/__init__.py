"""What a block of bits means: pure array functions, no files, no models."""

# Importing a family registers its formats, in this order.
from qjax.formats import plain, legacy, kquants, nonlinear, iquants, iq1, ternary, microscaling, nf4  # noqa: F401, I001
from qjax.formats._format import Field, Format, Integers, Scales, by_id, get, names
from qjax.formats._rounding import check as check_rounding
from qjax.formats._rounding import names as rounding_names
from qjax.formats.affine import Affine
from qjax.formats.plain import plain_format

__all__ = [
    "Affine",
    "Field",
    "Format",
    "Integers",
    "Scales",
    "by_id",
    "check_rounding",
    "get",
    "names",
    "plain_format",
    "rounding_names",
]
