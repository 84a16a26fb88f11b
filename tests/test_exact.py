"""The cases of test_bytes.py with four million weights of each kind, and the README's column of contracts.

A file is one process's under xdist's `--dist loadfile`, so that the last test has seen what the others measured.
"""

import runpy
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from oracles import ggml, weights

import qjax

pytestmark = pytest.mark.exact

N = 2**22
KINDS = {**weights.MODEL_LIKE, "tiny_model": weights.tiny_model}

readme_table = runpy.run_path(str(ROOT / "tools" / "readme_table.py"))

# Blocks by format.
compared, differing = Counter(), Counter()


@pytest.fixture(scope="module", params=[*KINDS, "smollm2"])
def many_weights(request):
    """Of the module's scope, so that all cases are tested with one kind before the next is drawn."""
    if request.param == "smollm2":
        return weights.gguf_model(request.getfixturevalue("smollm2_path"), N)
    return weights.draw(KINDS[request.param], N)


@ggml.EACH_CASE
def test_bytes_equal_ggmls(name, weighted, many_weights):
    """And the weights that they stand for equal gguf's."""
    format, x = qjax.formats.get(name), many_weights
    importance = weights.importance(x.shape[1]) if weighted else None
    t = qjax.quantize(x, name, importance=importance)
    theirs = ggml.reference(name, x, importance).reshape(-1, format.type_size)
    ours = np.asarray(t.to_bytes()).reshape(theirs.shape)
    compared[name] += len(theirs)
    differing[name] += np.count_nonzero((ours != theirs).any(axis=1))
    ggml.assert_same_values(format, qjax.dequantize(t), ggml.dequantize(name, ours))
    if format.exactness == readme_table["contract"](0):
        ggml.assert_same_bytes(format, ours, theirs, x)


def test_the_readme_states_what_was_measured():
    if not compared:
        pytest.skip("no bytes were compared in this process")
    rows = readme_table["table"]({name: differing[name] / compared[name] for name in compared})
    text = readme_table["README"].read_text(encoding="utf-8")
    assert [row for row in rows.splitlines() if row not in text] == []
