"""Files of strangers: readers refuse with QjaxError, one line, in time and in little memory.  See tests/fuzz."""

import random
import subprocess
import sys

import pytest
from conftest import ROOT
from fuzz.cases import CASES
from fuzz.mutation import Input, Mutator
from fuzz.running import MAX_BYTES, MAX_SECONDS, Runner, runner
from fuzz.targets import TARGETS, Target, words
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qjax import QjaxError

EXECUTIONS = 150
"""of each target"""


@pytest.fixture(scope="module")
def run():
    """A Runner for each target, by name; each reads its seeds as it is made."""
    with pytest.MonkeyPatch.context() as patch:
        del patch
        yield
