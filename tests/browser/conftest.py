"""Fixtures: a browser, JupyterLab over a copy of the notebooks, Voila; each is started once, or skips with a reason."""

import contextlib
import importlib.util
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ARGUMENTS = (
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # What a page would fetch from elsewhere is not there, as on a machine without a network.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
_START_S = 120

# All cells are in the page, also those out of sight; nothing asks or announces.
_LAB_SETTINGS = {
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def _need(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f'{module} is missing: pip install -e ".[test,browser]"')


@pytest.fixture(scope="session")
def browser():
    """Chromium: the one that QJAX_CHROMIUM names, else an installed one."""
    _need("playwright")
    from playwright.sync_api import sync_playwright

    path = os.environ.get("QJAX_CHROMIUM") or next(filter(None, map(shutil.which, _CHROMIUM)), None)
    if not path:
        pytest.skip(f"no Chromium: QJAX_CHROMIUM does not name one, and none of {', '.join(_CHROMIUM)} is installed")
    with sync_playwright() as playwright:
        # Scroll bars are hidden in a browser without a window, but take their room in a reader's.
        started = playwright.chromium.launch(
            executable_path=path, args=[*_ARGUMENTS], ignore_default_args=["--hide-scrollbars"]
        )
        yield started
        started.close()


@pytest.fixture(scope="session")
def notebooks(tmp_path_factory) -> Path:
    """A copy of the folder of notebooks, to be run and saved into."""
    return Path(shutil.copytree(ROOT / "notebooks", tmp_path_factory.mktemp("copy") / "notebooks"))


@pytest.fixture(scope="session")
def lab(browser, notebooks, tmp_path_factory) -> Iterator[str]:
    """Address of a JupyterLab over `notebooks`; put a path for "{}"."""
    _need("jupyterlab")
    home, token = tmp_path_factory.mktemp("lab"), secrets.token_hex()
    for name, settings in _LAB_SETTINGS.items():
        path = home / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(settings))
    options = [f"--ServerApp.root_dir={notebooks}", f"--IdentityProvider.token={token}", "--ServerApp.allow_root=True"]
    options += ["--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly"]
    with _serving(home, "jupyterlab", "--ServerApp.port={}", *options) as port:
        yield f"http://127.0.0.1:{port}/lab/workspaces/test/tree/{{}}?reset&token={token}"


@pytest.fixture(scope="session")
def voila(browser, notebooks, tmp_path_factory) -> Iterator[str]:
    """Address of the playground in Voila."""
    _need("voila")
    home, token = tmp_path_factory.mktemp("voila"), secrets.token_hex()
    options = [str(notebooks / "10_playground.ipynb"), f"--token={token}"]
    with _serving(home, "voila", "--port={}", *options) as port:
        yield f"http://127.0.0.1:{port}/?token={token}"


@contextlib.contextmanager
def _serving(home: Path, module: str, port_option: str, *options: str) -> Iterator[int]:
    """Runs a Jupyter program whose every setting lies in ``home``, and yields the port where it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {"CONFIG_DIR": "config", "DATA_DIR": "data", "RUNTIME_DIR": "run"}
    environment = {f"JUPYTER_{name}": str(home / folder) for name, folder in folders.items()}
    environment |= {f"JUPYTERLAB_{name}_DIR": str(home / name.lower()) for name in ("SETTINGS", "WORKSPACES")}
    environment |= {"IPYTHONDIR": str(home / "ipython")}
    command = [sys.executable, "-m", module, "--no-browser", port_option.format(port), *options]
    log = home / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=home, env=os.environ | environment, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(port):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{module} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True
