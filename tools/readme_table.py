"""Writes the tables of formats and of methods into README.md, from what registers them:

python tools/readme_table.py
"""

from collections.abc import Mapping
from pathlib import Path

from qjax import formats
from qjax.methods import pipeline, recipes

README = Path(__file__).resolve().parents[1] / "README.md"


def contract(share: float) -> str:
    """What is said of a format of whose blocks this share differs from ggml's."""
    return f"{100 * share:.2g} % of blocks differ" if share else formats.Format.exactness


def table(differing: Mapping[str, float] | None = None) -> str:
    """A row for each format that has a quantizer, by family and size.

    differing: shares of differing blocks as measured, by format; else the contract is the one that the format states.
    """
    known = [formats.get(name) for name in formats.names()]
    measured = {name: contract(share) for name, share in (differing or {}).items()}
    rows = [("format", "family", "block", "bytes", "bits per weight", "rounding", "imatrix", "contract"), ("---",) * 8]
    for f in sorted((f for f in known if f.encodable), key=lambda f: (f.family != "legacy", f.family, f.bpw, f.name)):
        rule = f.rounding.replace("_", " ") if f.rounding else "–"
        size = f.block_size, f.type_size, f"{f.bpw:.4g}"
        rows.append((f.name, f.family, *size, rule, _imatrix(f), measured.get(f.name, f.exactness)))
    affine = formats.Affine()
    size = "any, row, tensor", "⌈block · bits / 8⌉ + scales", "1–8 + scales"
    rows.append(("Affine", affine.family, *size, "any", _imatrix(affine), affine.exactness))
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)


def _imatrix(f: formats.Format) -> str:
    """What an importance matrix does for a format, and whether llama-quantize insists on one."""
    if any(f.name in names.split() for file_type, names in recipes.NEED_IMATRIX if not file_type):
        return "needed"
    return "used" if f.uses_importance else "–"


def methods() -> str:
    """A row for each method: its name, what it does, whether it needs text."""
    rows = [("method", "", "looks at text"), ("---",) * 3]
    for name, method in pipeline.METHODS.items():
        rows.append(
            (f"`{name}`" + ("+" if method.transforms else ""), method.about, "yes" if method.calibrated else "–")
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def update(text: str) -> str:
    """The README with its tables made anew."""
    for name, made in (("formats", table), ("methods", methods)):
        begin, end = f"<!-- {name}: written by tools/readme_table.py -->", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made()}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    README.write_text(update(README.read_text(encoding="utf-8")), encoding="utf-8")
