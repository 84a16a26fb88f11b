"""The kernels of nbval start with `tests/every_stop.py`, which puts every control through all its stops."""

import os
import shutil
import tempfile
from pathlib import Path

STARTUP = Path(__file__).parents[1] / "tests" / "every_stop.py"


def pytest_configure(config):
    folder = tempfile.mkdtemp()
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    startup = Path(folder) / "profile_default" / "startup"
    startup.mkdir(parents=True)
    shutil.copy(STARTUP, startup)
    os.environ["IPYTHONDIR"] = folder
