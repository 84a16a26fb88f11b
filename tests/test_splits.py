"""qjax split and merge, against llama-gguf-split and gguf-py's reader."""

import shutil
import subprocess

import gguf as gguf_py
import numpy as np
import pytest
from conftest import fails

from qjax import QjaxError
from qjax.io import gguf, splits
from qjax.io.gguf import Value, ValueType
from qjax.io.splits import merge, parse_size, split

METADATA = {"general.architecture": "llama", "words": ["a", "b"], "n": Value(ValueType.INT64, -1)}
SIZES = (100, 7, 300, 64, 1, 32, 8)
"""Floats of each tensor; in bytes, padded: 416 32 1216 256 32 128 32."""
TENSORS = {f"blk.{i}.weight": np.full(size, i, np.float32) for i, size in enumerate(SIZES)}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "whole.gguf"
    gguf.write(path, METADATA, TENSORS)
    return path


def shards_of(folder, prefix="m"):
    return {path.name: path.read_bytes() for path in sorted(folder.glob(f"{prefix}-*.gguf"))}


def n_tensors(report):
    return [file.n_tensors for file in report.files]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [7]),
        ({"max_tensors": 3}, [3, 3, 1]),
        ({"max_tensors": 7}, [7]),
        ({"max_tensors": 1}, [1] * 7),
        ({"max_bytes": 448}, [2, 1, 4]),
        ({"max_bytes": 447}, [1, 1, 1, 3, 1]),
        ({"max_bytes": 1}, [1] * 7),
        ({"max_bytes": 10**9}, [7]),
        ({"max_tensors": 3, "no_tensor_first_split": True}, [0, 3, 3, 1]),
        ({"max_bytes": 1696, "no_tensor_first_split": True}, [0, 3, 4]),
    ],
)
def test_shards_by_gguf_py(tmp_path, source, limits, expected):
    report = split(source, tmp_path / "m", **limits)
    assert n_tensors(report) == expected
    assert [file.path for file in report.files] == [
        str(tmp_path / f"m-{i:05}-of-{len(expected):05}.gguf") for i in range(1, len(expected) + 1)
    ]
    found = {}
    for i, file in enumerate(report.files):
        raw = (tmp_path / file.path).read_bytes()
        assert len(raw) == file.size_bytes
        reader = gguf_py.GGUFReader(file.path)
        keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        own = [*METADATA] if i == 0 else []
        assert list(keys) == [*own, "split.no", "split.tensors.count", "split.count"]
        assert [keys[key].contents() for key in list(keys)[-3:]] == [i, 7, len(expected)]
        assert [keys[key].types[0].name for key in list(keys)[-3:]] == ["UINT16", "INT32", "UINT16"]
        found |= {tensor.name: tensor.data for tensor in reader.tensors}
    assert list(found) == list(TENSORS)
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(found[name], values)


def test_merged_is_the_whole_again(run, tmp_path, source):
    split(source, tmp_path / "m", max_tensors=2)
    code, out, _ = run("merge", tmp_path / "m-00003-of-00004.gguf", tmp_path / "merged.gguf")
    assert code == 0
    assert "merged.gguf" in out
    merged, whole = gguf.read(tmp_path / "merged.gguf"), gguf.read(source)
    assert merged.metadata == whole.metadata | {
        "split.no": Value(ValueType.UINT16, 0),
        "split.tensors.count": Value(ValueType.INT32, 7),
        "split.count": Value(ValueType.UINT16, 0),
    }
    assert [*merged.tensors] == [*whole.tensors]
    for name, tensor in whole.tensors.items():
        assert merged.tensors[name].data.tobytes() == tensor.data.tobytes()
    # It can be split again, to the same shards; and so can shards.
    split(tmp_path / "merged.gguf", tmp_path / "n", max_tensors=2)
    split(tmp_path / "m-00001-of-00004.gguf", tmp_path / "o", max_tensors=2)
    shards = [list(shards_of(tmp_path, prefix).values()) for prefix in "mno"]
    assert shards[0] == shards[1] == shards[2]


@pytest.mark.parametrize(
    "options",
    [
        ["--split-max-tensors", "2"],
        ["--split-max-tensors", "3", "--no-tensor-first-split"],
        ["--split-max-tensors", "7"],
        ["--split-max-size", "1M"],
        ["--split-max-size", "2M", "--no-tensor-first-split"],
        [],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("before", [{}, {"split.count": Value(ValueType.UINT16, 0), "z": "last"}], ids=["", "merged"])
def test_bytes_of_llama_gguf_split(run, tmp_path, llama_cpp, options, before):
    program = shutil.which("llama-gguf-split", path=llama_cpp)
    assert program
    sizes = (200_000, 150_000, 3, 100_000, 400_000, 31, 96)  # Up to 1.6 MB; they pass 1 MB and 2 MB in the middle.
    gguf.write(
        tmp_path / "whole.gguf",
        METADATA | before,
        {f"t{i}": np.full(n, i, np.float32) for i, n in enumerate(sizes)},
    )
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    subprocess.run(
        [program, "--split", *options, tmp_path / "whole.gguf", theirs / "m"], check=True, capture_output=True
    )
    assert run("split", tmp_path / "whole.gguf", ours / "m", *options)[0] == 0
    assert shards_of(theirs)
    assert shards_of(ours) == shards_of(theirs)

    first = next(iter(shards_of(ours)))
    subprocess.run([program, "--merge", theirs / first, theirs / "merged.gguf"], check=True, capture_output=True)
    assert run("merge", ours / first, ours / "merged.gguf")[0] == 0
    assert (ours / "merged.gguf").read_bytes() == (theirs / "merged.gguf").read_bytes()


def test_an_alignment_of_its_own_stays_with_the_first_shard(tmp_path):
    """Where llama-gguf-split writes a first shard that cannot be read."""
    gguf.write(tmp_path / "whole.gguf", METADATA | {"general.alignment": 64}, TENSORS)
    split(tmp_path / "whole.gguf", tmp_path / "m", max_tensors=3)
    file = gguf.read(tmp_path / "m-00001-of-00003.gguf")
    for name, values in TENSORS.items():
        np.testing.assert_array_equal(file.tensors[name].load(), values)
    merge(file.paths[0], tmp_path / "merged.gguf")
    assert gguf.read(tmp_path / "merged.gguf").metadata["general.alignment"] == 64


def test_a_file_without_tensors(tmp_path):
    gguf.write(tmp_path / "whole.gguf", METADATA, {})
    report = split(tmp_path / "whole.gguf", tmp_path / "m")
    assert n_tensors(report) == [0]
    merge(report.files[0].path, tmp_path / "merged.gguf")
    assert not gguf.read(tmp_path / "merged.gguf").tensors


def test_dry_run_writes_nothing_and_tells_the_sizes(run, tmp_path, source):
    before = sorted(tmp_path.iterdir())
    plan = split(source, tmp_path / "m", max_tensors=3, dry_run=True)
    code, out, _ = run("split", source, tmp_path / "m", "--split-max-tensors", 3, "--dry-run")
    assert code == 0
    assert "dry run, nothing written" in out
    assert sorted(tmp_path.iterdir()) == before
    written = split(source, tmp_path / "m", max_tensors=3)
    assert written.files == plan.files
    assert (plan.written, written.written) == (False, True)
    merged = merge(plan.files[0].path, tmp_path / "merged.gguf", dry_run=True)
    assert not (tmp_path / "merged.gguf").exists()
    assert merge(plan.files[0].path, tmp_path / "merged.gguf").files == merged.files


def test_all_shards_or_none(tmp_path, source, monkeypatch):
    """The disk is full when the third shard is written."""
    calls = []

    def write(path, metadata, tensors, write=gguf.write):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(28, "No space left on device", str(path))
        write(path, metadata, tensors)

    monkeypatch.setattr(gguf, "write", write)
    with pytest.raises(OSError, match="No space left"):
        split(source, tmp_path / "m", max_tensors=2)
    assert len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["whole.gguf"]


@pytest.mark.parametrize(("text", "size"), [("1M", 10**6), ("128M", 128 * 10**6), ("2G", 2 * 10**9)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "0M", "-1M", "1", "1K", "1.5G", "1 M", "1m", "١M"])
def test_sizes_that_are_none(text):
    with pytest.raises(QjaxError, match="as in 500M or 2G"):
        parse_size(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["split", "absent.gguf", "m"], "no such file"),
        (["split", "whole.gguf", "m", "--split-max-size", "12"], "expected a whole number of megabytes"),
        (["split", "whole.gguf", "m", "--split-max-size", "1M", "--split-max-tensors", "2"], "not both"),
        (["split", "whole.gguf", "taken", "--split-max-tensors", "4"], "taken-00002-of-00002.gguf: exists already"),
        (["split", "whole.gguf", "no/such/m"], "no/such"),
        (["merge", "whole.gguf", "out.gguf"], "is not a shard"),
        (["merge", "m-00001-of-00002.gguf", "whole.gguf"], "whole.gguf: exists already"),
        (["merge", "lost-00001-of-00002.gguf", "out.gguf"], "1 of 2 shards are missing"),
    ],
)
def test_bad_input(run, tmp_path, source, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    split(source, "m", max_tensors=4)
    split(source, "lost", max_tensors=4)
    (tmp_path / "lost-00002-of-00002.gguf").unlink()
    (tmp_path / "taken-00002-of-00002.gguf").write_bytes(b"precious")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fails(run(*arguments), message)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_link_that_leads_nowhere_is_in_the_way(run, tmp_path, source):
    """What would be written is not where it leads."""
    try:
        (tmp_path / "m-00002-of-00002.gguf").symlink_to(tmp_path / "elsewhere")
    except OSError:
        pytest.skip("no links may be made here")
    fails(run("split", source, tmp_path / "m", "--split-max-tensors", 4), "m-00002-of-00002.gguf: exists already")
    assert [path.name for path in tmp_path.iterdir() if path.name != source.name] == ["m-00002-of-00002.gguf"]


def test_limits_that_make_no_sense(tmp_path, source, monkeypatch):
    for limits in ({"max_tensors": 0}, {"max_bytes": 0}):
        with pytest.raises(QjaxError, match="expected at least 1"):
            split(source, tmp_path / "m", **limits)
    monkeypatch.setattr(splits, "MAX_SHARDS", 6)
    with pytest.raises(QjaxError, match="7 shards, more than 6"):
        split(source, tmp_path / "m", max_tensors=1)
