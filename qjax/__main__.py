"""``python -m qjax`` is the command ``qjax``."""

from qjax.cli import main

if __name__ == "__main__":
    main()
