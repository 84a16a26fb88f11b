"""What fuzzing found, kept: inputs that a reader once did not take as it should."""

from typing import NamedTuple

from . import seeds
from .mutation import Input
from .packing import Tree


class Case(NamedTuple):
    """An input of a target, and whether it is to be refused."""

    target: str
    files: Tree
    refused: bool = True
    patches: tuple = ()

    @property
    def input(self) -> Input:
        return Input(self.files, list(self.patches))


def _config(**entries) -> Tree:
    return {"config.json": seeds.HF_LLAMA | entries}


CASES: dict[str, Case] = {}
