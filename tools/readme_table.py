"""Writes the table of formats into README.md, from the registry:

python tools/readme_table.py
"""

from pathlib import Path

from qjax import formats

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- formats: written by tools/readme_table.py -->", "<!-- /formats -->"


def table() -> str:
    """A row for each format that weights are quantized to: size, tie rule, what is promised of its bytes."""
    rows = [("format", "block", "bytes", "bits per weight", "rounding", "contract"), ("---",) * 6]
    for f in map(formats.get, formats.names()):
        if f.family not in ("integer", "wide"):
            rule = f.rounding.replace("_", " ") if f.rounding else "–"
            rows.append((f.name, f.block_size, f.type_size, f"{f.bpw:g}", rule, f.exactness))
    exactness = formats.Affine().exactness
    rows.append(("Affine", "any, row, tensor", "⌈block · bits / 8⌉ + scales", "1–8 + scales", "any", exactness))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def update(text: str) -> str:
    """The README with its table made anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8")), encoding="utf-8")
