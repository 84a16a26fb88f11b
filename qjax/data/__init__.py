"""What works without a network: a generator of tales whose entropy is known, and the model trained on them."""

from qjax.data import tales

__all__ = ["tales"]
