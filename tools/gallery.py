"""Copies the first figure of some notebooks, as stored in them, to docs/gallery, and shows them in README.md:

python tools/gallery.py
"""

import base64
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = "docs/gallery"
SHOWN = ("00", "02", "03", "05", "06", "08")
BEGIN, END = "<!-- gallery: written by tools/gallery.py -->", "<!-- /gallery -->"


def notebooks() -> list[Path]:
    return [next((ROOT / "notebooks").glob(f"{number}_*.ipynb")) for number in SHOWN]


def figure(notebook: Path) -> tuple[bytes, str]:
    """The first picture that a notebook shows, a PNG, and what it shows in words.

    Raises StopIteration if there is none.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    shown = (output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))
    data = next(data for data in shown if "image/png" in data)
    words = "".join(data["text/plain"]).removeprefix("Figure: ")
    return base64.b64decode("".join(data["image/png"])), " ".join(words.split())


def title(notebook: Path) -> str:
    """The question that a notebook asks."""
    first = "".join(json.loads(notebook.read_text(encoding="utf-8"))["cells"][0]["source"])
    return first.splitlines()[0].removeprefix("# ")


def picture_of(notebook: Path) -> Path:
    return ROOT / FOLDER / f"{notebook.stem}.png"


def table() -> str:
    """Two figures a row, each a link to its notebook."""
    cells = []
    for notebook in notebooks():
        alt = figure(notebook)[1].translate(str.maketrans({"|": "\\|", "[": "(", "]": ")"}))
        link = f"notebooks/{notebook.name}"
        picture = f"[![{alt}]({FOLDER}/{picture_of(notebook).name})]({link})"
        cells.append(f"{picture}<br>[{notebook.stem[:2]} · {title(notebook)}]({link})")
    rows = [" | ".join(cells[i : i + 2]) for i in range(0, len(cells), 2)]
    return "\n".join(["| | |", "|---|---|", *(f"| {row} |" for row in rows)])


def update(text: str) -> str:
    """The README with its gallery made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
    for path in notebooks():
        picture_of(path).write_bytes(figure(path)[0])
    readme = ROOT / "README.md"
    readme.write_text(update(readme.read_text(encoding="utf-8")), encoding="utf-8")
