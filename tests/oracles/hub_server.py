"""A Hugging Face Hub on this machine, as far as huggingface_hub asks for anything to download a model.

What is answered follows the Hub's API (huggingface.co/docs/hub/api) and what huggingface_hub reads of the answers
(file_download.get_hf_file_metadata, utils/_http.hf_raise_for_status): large files are told by their sha256 and size and
lie at another address, small ones by git's hash of a file.
"""

import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

LARGE = (".gguf", ".safetensors", ".bin")


@dataclass
class Repository:
    """Files by branch or tag, and who may have them."""

    revisions: dict[str, dict[str, bytes]]
    token: str = ""
    """Without it there is no such repository."""
    gated: bool = False
    """Anyone may see what there is, and nobody read it."""

    def commit(self, revision: str) -> str:
        """Of other files it is another one."""
        described = [_described(name, body, True) for name, body in self.revisions[revision].items()]
        return hashlib.sha1(json.dumps(described).encode()).hexdigest()

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and the files of a branch, a tag or a commit."""
        for name, files in self.revisions.items():
            if revision in (name, self.commit(name)):
                return self.commit(name), files
        return None


@dataclass
class Hub:
    """A server's repositories, its troubles, and what it was asked for."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    endpoint: str = ""
    status: int = 200
    """Another one is all that it answers."""
    bodies: dict[str, bytes] = field(default_factory=dict)
    """Files that come with other contents than was said."""
    cuts: list[int] = field(default_factory=list)
    """After so many bytes the next bodies end, or wait for ``go``."""
    go: threading.Event | None = None
    read: list[tuple[str, int]] = field(default_factory=list)
    """The files that were asked for, and from which byte on."""

    def put(self, files: dict[str, bytes], repo: str = "org/repo", revision: str = "main", **access) -> None:
        """These are the files now."""
        kept = self.repositories.get(repo, Repository({})).revisions
        self.repositories[repo] = Repository(kept | {revision: files}, **access)


def _described(name: str, body: bytes, tree: bool) -> dict:
    sha256, git = hashlib.sha256(body).hexdigest(), hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
    large = {"sha256": sha256, "oid": sha256, "size": len(body), "pointerSize": 130}
    entry = {"type": "file", "path": name, "oid": git} if tree else {"rfilename": name, "blobId": git}
    return entry | {"size": len(body)} | ({"lfs": large} if name.endswith(LARGE) else {})


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if self.hub.status != 200:
            return self._fail(self.hub.status)
        if path.startswith("/cdn/"):
            return self._large(*path.split("/", 4)[2:])
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(tree|revision)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        found = api or file
        repo = self.hub.repositories.get(found[1]) if found else None
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == "expired":
            return self._fail(401, message="Invalid credentials in Authorization header")
        if repo is None or (repo.token and token != repo.token):
            return self._fail(404 if token else 401, "RepoNotFound")
        if repo.gated and file:
            return self._fail(403, "GatedRepo")
        at = repo.files((api[3] if api else file[2]) or "main")
        if at is None:
            return self._fail(404, "RevisionNotFound")
        commit, files = at
        if api and api[2] == "tree":
            return self._json([_described(name, body, True) for name, body in files.items()])
        if api:
            siblings = [_described(name, body, False) for name, body in files.items()]
            return self._json({"id": found[1], "sha": commit, "siblings": siblings})
        if file[3] not in files:
            return self._fail(404, "EntryNotFound")
        body, headers = files[file[3]], {"X-Repo-Commit": commit}
        said = _described(file[3], body, True)
        if "lfs" not in said:
            return self._file(file[3], body, headers | {"ETag": f'"{said["oid"]}"'})
        headers |= {"X-Linked-Etag": f'"{said["lfs"]["sha256"]}"', "X-Linked-Size": str(len(body))}
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        location = f"{elsewhere}/cdn/{found[1].replace('/', '--')}/{commit}/{file[3]}"
        return self._send(302, b"", headers | {"Location": location})

    do_HEAD = do_GET

    def _large(self, repo, commit, name):
        _, files = self.hub.repositories[repo.replace("--", "/")].files(commit)
        self._file(name, files[name], {})

    def _file(self, name, body, headers):
        body, start, cut = self.hub.bodies.get(name, body), 0, None
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(found[1])
            headers = headers | {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
        if self.command == "GET":
            self.hub.read.append((name, start))
            cut = self.hub.cuts.pop(0) if self.hub.cuts else None
        self._send(206 if start else 200, body[start:], headers, cut)

    def _json(self, content):
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status, code="", message=""):
        self._send(status, b"", {k: v for k, v in {"X-Error-Code": code, "X-Error-Message": message}.items() if v})

    def _send(self, status, body, headers, cut=None):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
            if cut is not None and self.hub.go:
                self.hub.go.wait(60)
        self.close_connection = self.close_connection or cut is not None

    def log_message(self, *_):
        pass


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers at its ``endpoint`` while the block runs, in threads."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
