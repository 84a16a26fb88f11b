"""What a block of bits means: pure array functions, no files, no models."""

from qjax.formats import legacy, plain  # noqa: F401  (importing a family registers its formats)
from qjax.formats._format import Field, Format, by_id, get, names
from qjax.formats._rounding import check as check_rounding
from qjax.formats._rounding import names as rounding_names
from qjax.formats.affine import Affine
from qjax.formats.plain import plain_format

__all__ = ["Affine", "Field", "Format", "by_id", "check_rounding", "get", "names", "plain_format", "rounding_names"]
