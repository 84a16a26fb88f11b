"""Models in the repositories of the Hugging Face Hub: the files that are needed, fetched, and their hashes compared.

huggingface_hub speaks to the Hub and keeps its cache, where other programs find the same files.  It compares their
sizes; their hashes are compared here, once.
"""

import contextlib
import glob
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

from qjax.errors import QjaxError
from qjax.io import snapshot
from qjax.io.checkpoints import INDEX, WEIGHTS, weight_files
from qjax.io.cursor import shorten
from qjax.io.download import cache_folder, download
from qjax.progress import progress
from qjax.table import printable

_ID = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.-]+(?:/[\w.-]+)*))?(?::([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
# What huggingface_hub 2 leaves of a download that was cut off.  It does not go on with such a file, older ones do
# with theirs, which have no such number.
_ABANDONED = re.compile(r"\.[0-9a-f]{8}\.incomplete")
# Beside the weights: config, tokenizer, chat template.
_DESCRIBING = (".json", ".jinja", ".model")
# GGUF files that are parts of a model or notes about it (llama.cpp, common/download.cpp gguf_filename_is_model).
_NO_MODEL = re.compile(r"mmproj|imatrix|mtp-|eagle3-|dflash-|dspark-")
_TIMEOUT_S, _CHUNK_BYTES, _MOST_LISTED = 10, 2**20, 30

# By the classes of huggingface_hub's exceptions, then by HTTP status; the first that fits.
_FAILURES: Mapping[str | int, str] = {
    "OfflineModeIsEnabled": "it is not in the cache ({cache}), and HF_HUB_OFFLINE forbids to fetch it",
    "GatedRepoError": "it is gated. Ask for access at {endpoint}/{repo}, and set HF_TOKEN to a token of yours",
    "RevisionNotFoundError": "it has no revision {revision}",
    "RepositoryNotFoundError": "there is no such repository, or it is private: then set HF_TOKEN to a token that may "
    "read it",
    401: "the token was refused. Set HF_TOKEN to a valid one, or unset it for what is public",
    403: "the token may not read it. Set HF_TOKEN to one that may",
}


class HubId(NamedTuple):
    """``org/repo``, ``org/repo@revision``, ``org/repo:file``, ``org/repo@revision:file``."""

    repo: str
    revision: str = "main"
    """A branch, a tag, or a commit."""
    file: str = ""
    """The name of a GGUF file, or a part of it, such as its type."""

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """None for what is no id, as paths to files."""
        found = _ID.fullmatch(text)
        if not found or text.startswith(".") or found[1].endswith((".gguf", ".safetensors")):
            return None
        if any({*part.split("/")} & {".", ".."} for part in found.groups() if part):
            return None  # They become parts of paths.
        return cls(found[1], found[2] or "main", found[3] or "")

    def __str__(self) -> str:
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.file}" if self.file else "")


@dataclass(frozen=True)
class _Revision:
    """What the Hub says of a revision; or else what the cache has of it, and why the Hub was not heard."""

    id: HubId
    folder: Path
    """Its place in the cache."""
    sizes: Mapping[str, int]
    """In bytes, of all files."""
    digests: Mapping[str, str]
    """sha256 of the large files, of the others git's hash, where the Hub says them."""
    failure: str = ""


def fetch(id: HubId) -> Path:
    """The GGUF file that ``id`` means, or, if it names none, the folder of the repository's safetensors.

    Only what is read of a repository is fetched: the one GGUF file with its shards; or config, tokenizer and the
    safetensors of the model.  What was fetched before is found without a network.

    Raises QjaxError if there is no such repository, revision or file, more than one, no access, no network, and for
    files that are not what the Hub says they are.
    """
    revision = _ask(id)
    if id.file or not {WEIGHTS, INDEX} & revision.sizes.keys():
        names = _choose_gguf(revision)
        return _have(revision, names) / names[0]
    names = [name for name in revision.sizes if "/" not in name and name.endswith(_DESCRIBING)]
    if WEIGHTS in revision.sizes:
        return _have(revision, [*names, WEIGHTS])
    shards = [path.name for path, _ in weight_files(_have(revision, names))]
    return _have(revision, [name for name in shards if name in revision.sizes])


def cached_names() -> tuple[str, ...]:
    """What `HubId.parse` takes for the models that were downloaded from the Hub before, by whatever program."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return ()
    found = set()
    for repo in repos:
        for revision in repo.revisions if repo.repo_type == "model" else ():
            files = {file.file_name for file in revision.files}
            ggufs = {_SHARD.sub("", name) for name in files if name.endswith(".gguf")}
            meant = {""} if any(name.endswith(".safetensors") for name in files) else ggufs
            found |= {str(HubId(repo.repo_id, ref, name)) for ref in revision.refs for name in meant}
    return tuple(sorted(found))


def _ask(id: HubId) -> _Revision:
    from huggingface_hub import HfApi, constants

    storage = _storage(id)
    # The library lets the exceptions of several HTTP packages through: all of them mean that it failed.
    try:
        info = HfApi().model_info(id.repo, revision=id.revision, timeout=_TIMEOUT_S, files_metadata=True)
    except Exception as error:
        failure = _explain(id, snapshot.describe(error))
        if not (folder := _cached(storage, id.revision)):
            raise QjaxError(failure) from error
        found = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in found}
        return _Revision(id, folder, sizes, {}, failure)
    if not _COMMIT.fullmatch(info.sha or ""):
        raise QjaxError(f"{constants.ENDPOINT}: is no Hub: of {id.repo} it says no commit")
    files = info.siblings or ()
    digests = {file.rfilename: file.lfs["sha256"] if file.lfs else file.blob_id for file in files}
    return _Revision(
        id,
        storage / "snapshots" / str(info.sha),
        {file.rfilename: file.size or 0 for file in files},
        {name: digest for name, digest in digests.items() if digest},
    )


def _storage(id: HubId) -> Path:
    """Where huggingface_hub keeps a repository: refs/REVISION has a commit, snapshots/COMMIT the files."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE, f"models--{id.repo.replace('/', '--')}")


def _cached(storage: Path, revision: str) -> Path | None:
    ref = storage / "refs" / revision
    commit = ref.read_text().strip() if ref.is_file() else revision
    folder = storage / "snapshots" / commit
    return folder if _COMMIT.fullmatch(commit) and folder.is_dir() else None


def _explain(id: HubId, told: Mapping[str, Any]) -> str:
    """One line on why the Hub gives no answer, from what `snapshot.describe` says."""
    from huggingface_hub import constants

    reason = next((text for cause, text in _FAILURES.items() if cause in (*told["kinds"], told["status"])), None)
    if reason is None:
        return f"Hugging Face Hub {id}: cannot be reached ({told['message']})"
    known = {"repo": id.repo, "revision": id.revision, "endpoint": constants.ENDPOINT, "cache": constants.HF_HUB_CACHE}
    return f"Hugging Face Hub {id}: {reason.format(**known)}"


def _choose_gguf(revision: _Revision) -> list[str]:
    """The file meant, or its shards in their order: of that name, else with that word in it, else with it at all."""
    id = revision.id
    shards: dict[str, list[str]] = {}
    for name in sorted(revision.sizes):
        if name.endswith(".gguf"):
            shards.setdefault(_SHARD.sub("", name), []).append(name)
    models = [name for name in shards if not _NO_MODEL.search(name.rpartition("/")[2])]
    found = models
    if wanted := _SHARD.sub("", id.file):
        # Q4_0 is not meant to be Q4_0_4_4, nor F16 to be BF16.
        word = re.compile(rf"(?<![^\W_]){re.escape(wanted)}(?!\w)", re.IGNORECASE)
        exact = [name for name in shards if wanted in (name, name.rpartition("/")[2])]
        whole = [name for name in models if word.search(name)]
        found = exact or whole or [name for name in models if wanted.lower() in name.lower()]
    if len(found) != 1:
        expected = f"one GGUF file with {wanted!r} in its name" if wanted else f"{WEIGHTS}, {INDEX} or one GGUF file"
        there = [printable(name) for name in found or shards or revision.sizes]
        listed = ", ".join(there[:_MOST_LISTED]) + (", ..." if len(there) > _MOST_LISTED else "")
        hint = f" Say which after a colon: {id._replace(file=there[0])}" if shards else ""
        where = f"the cache has {listed}; {revision.failure}" if revision.failure else f"found {listed or 'nothing'}"
        raise QjaxError(f"{id}: expected {expected}, {where}.{hint}")
    return shards[found[0]]


def _have(revision: _Revision, names: Sequence[str]) -> Path:
    """The folder with these files of the revision in it, all of them fetched and compared with their hashes."""
    for name in names:
        # Windows' rules see both kinds of separators, drives and "..", on every system.
        path = PureWindowsPath(name)
        if path.anchor or ".." in path.parts or "\\" in name or not name.isprintable():
            raise QjaxError(f"{revision.id}: {shorten(name)} is not a name of a file below the repository's folder")
    if missing := [name for name in names if not (revision.folder / name).is_file()]:
        _download(revision, missing)
    _compare(revision, names)
    return revision.folder


def _download(revision: _Revision, names: Sequence[str]) -> None:
    from huggingface_hub import constants, get_token

    id, storage, token = revision.id, _storage(revision.id), get_token()
    request = {"repo_id": id.repo, "revision": id.revision, "allow_patterns": [glob.escape(name) for name in names]}
    request |= {"cache_dir": str(constants.HF_HUB_CACHE), "endpoint": constants.ENDPOINT}
    # -P: its own folder is full of names, such as gguf, that belong to other packages there.
    command = [sys.executable, "-P", snapshot.__file__, json.dumps(request)]
    size_bytes = sum(revision.sizes[name] for name in names) or None
    before = set(storage.glob("blobs/*"))
    try:
        said = download(command, storage, str(id), size_bytes, {"HF_TOKEN": token} if token else {})
    except QjaxError as error:
        try:
            told = json.loads(str(error))
        except ValueError:
            told = {"kinds": [], "status": None, "message": str(error)}
        raise QjaxError(_explain(id, told)) from None
    finally:
        for path in set(storage.glob("blobs/*")) - before:
            if _ABANDONED.search(path.name):
                path.unlink(missing_ok=True)
    absent = [name for name in names if not (revision.folder / name).is_file()]
    if absent or Path(said).name != revision.folder.name:
        raise QjaxError(f"{id}: {revision.id.revision} was changed on the Hub meanwhile. Try again.")


def _compare(revision: _Revision, names: Sequence[str]) -> None:
    """Files whose hash is not what the Hub says are removed, and named in a QjaxError; no file is read twice."""
    digests = {revision.folder / name: revision.digests[name] for name in names if name in revision.digests}
    marks = {path: _mark(path, digest) for path, digest in digests.items()}
    hashes = {path: _hash_like(digest, path) for path, digest in digests.items() if not marks[path].exists()}
    size_bytes, desc = sum(path.stat().st_size for path in hashes), f"checking {revision.id}"
    for path, chunk in progress(_chunks(hashes), desc=desc, total=size_bytes, unit="B", size=lambda item: len(item[1])):
        hashes[path].update(chunk)
    wrong = [path for path, found in hashes.items() if found.hexdigest() != digests[path]]
    for path in wrong:
        # Its contents lie elsewhere, where the system has links; two names may share them.
        Path(os.path.realpath(path)).unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    # Where they cannot be marked, they are read again the next time.
    with contextlib.suppress(OSError):
        for path in hashes.keys() - set(wrong):
            marks[path].parent.mkdir(parents=True, exist_ok=True)
            marks[path].touch()
    if wrong:
        listed = ", ".join(path.relative_to(revision.folder).as_posix() for path in wrong)
        raise QjaxError(
            f"{revision.id}: the hash of {listed} is not what the Hub says. It was damaged on the way, so it was "
            "removed. Try again."
        )


def _mark(path: Path, digest: str) -> Path:
    """The empty file which says that ``path``, as it now is, has this hash."""
    status = path.stat()
    key = f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns} {digest}"
    return cache_folder() / "checked" / hashlib.sha256(key.encode()).hexdigest()


def _hash_like(digest: str, path: Path) -> Any:
    """sha256 yet without data, or where ``digest`` is one of git's, what git puts before a file."""
    if len(digest) == hashlib.sha256().digest_size * 2:
        return hashlib.sha256()
    return hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)


def _chunks(paths: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    for path in paths:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield path, chunk
