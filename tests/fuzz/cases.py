"""What fuzzing found, kept: inputs that a reader once did not take as it should."""

from typing import NamedTuple

from . import seeds
from .mutation import Input
from .packing import Tree


class Case(NamedTuple):
    """An input of a target."""

    target: str
    files: Tree
    patches: list = []  # noqa: RUF012

    @property
    def input(self) -> Input:
        return Input(self.files, self.patches)


def _config(**entries) -> Tree:
    return {"config.json": seeds.HF_LLAMA | entries}


CASES: dict[str, Case] = {}
