"""What the methods are worth: files of equal size, ours and llama-quantize's, judged by llama.cpp on the tiny model.

    QJAX_LLAMA_CPP=... python benchmarks/methods.py FOLDER [--rows NAME ...] [--json FILE]

FOLDER: where the files go; text, importance matrix and predictions of the float model that are there stay.

Three texts, which share no tale: one for calibration and training, from which llama-imatrix makes its matrix, too; one
that methods were tuned on, which this script does not use; one to judge by, of a seed that nothing else has.  Judge is
llama-perplexity --kl-divergence, keys and values in float32: of the file decoded to F32 (KLD), and as it is, where it
rounds activations to 8 bits as well.  All matrices of this model divide into blocks of 256, so that llama-quantize's
mixtures are what they are meant to be.

bytes: of the whole file; ours may not be larger than the preset's.  ratio: of the KLDs, ours by the preset's.
recovered: how much of the perplexity that plain rounding loses is won back.  time and memory: of the whole command,
with the programs that JAX compiles on the way.
"""

import argparse
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import side_by_side
from side_by_side import QJAX, Row, llama_cpp, run

from qjax import QjaxError
from qjax.data import tales
from qjax.progress import progress

COLUMNS = {
    "size_of": ("size of", ""),
    "method": ("method", ""),
    "size_bytes": ("bytes", ",.0f"),
    "ppl": ("PPL", ".4f"),
    "kld": ("KLD", ".2e"),
    "kld_stderr": ("±", ".0e"),
    "kld_as_is": ("KLD as it is", ".2e"),
    "ratio": ("ratio", ".2f"),
    "recovered": ("recovered", ".0%"),
    "goal": ("goal", ""),
    "time_s": ("time, s", ".0f"),
    "memory_mb": ("memory, MB", ".0f"),
}
PRESETS = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M")
TRAINED = {"Q2_K": "5e-4", "TQ2_0": "1e-3"}
"""File types to train for, and the learning rate of each."""
EACH = ("awq", "smooth", "rotate", "hqq", "clip", "gptq", "gptaq", "awq+gptaq")
"""What is beside round-to-nearest, all for the same mixture."""

CALIBRATION, JUDGED = tales.TRAINING, 999
"""Seeds; that for tuning is 0."""
N_TALES, CHUNKS = 800, 96
EXACT = ("-ctk", "f32", "-ctv", "f32", "-fa", "off", "-t", "1")
"""One thread, for on a busy machine llama.cpp's wait for each other in a loop."""


@dataclass(frozen=True)
class Place:
    """The files of a run, by their names in its folder."""

    folder: Path

    def __getitem__(self, name: str) -> Path:
        return self.folder / name


def prepare(at: Place) -> None:
    """The texts, the float model, llama.cpp's importance matrix and the float model's predictions."""
    for name, seed in (("calibration.txt", CALIBRATION), ("judged.txt", JUDGED)):
        at[name].write_text("".join(tale.text for tale in tales.generate(seed, N_TALES)), encoding="utf-8")
    if not at["f32.gguf"].exists():
        run((*QJAX, "quantize", "tiny", at["f32.gguf"], "F32"))
    if not at["imatrix.gguf"].exists():
        made = at["imatrix.tmp.gguf"]
        run((llama_cpp("llama-imatrix"), "-m", at["f32.gguf"], "-f", at["calibration.txt"], "-o", made))
        made.rename(at["imatrix.gguf"])
    if not at["base.kld"].exists():
        made = at["base.tmp"]
        windows = ("-f", at["judged.txt"], "-c", "512", "--chunks", str(CHUNKS))
        command = (llama_cpp("llama-perplexity"), "-m", at["f32.gguf"], *windows, *EXACT)
        run((*command, "--kl-divergence-base", made))
        made.rename(at["base.kld"])


# ── judging ──────────────────────────────────────────────────────────────────────────────────────────

_PRINTED = {"ppl": r"Mean PPL\(Q\)", "base": r"Mean PPL\(base\)", "kld": r"Mean +KLD"}


def divergence(at: Place, file: Path) -> dict[str, float]:
    """What llama-perplexity finds of a file, beside the float model."""
    command = (llama_cpp("llama-perplexity"), "-m", file, "--kl-divergence", "--kl-divergence-base", at["base.kld"])
    for _ in range(8):
        # Its last lines are printed by a thread that is not waited for.
        done = run((*command, "-c", "512", *EXACT))
        printed = done.output + done.log
        found = {key: re.search(rf"{name}\s*:\s*(\S+) ±\s*(\S+)", printed) for key, name in _PRINTED.items()}
        if all(found.values()):
            read = {key: (float(match[1]), float(match[2])) for key, match in found.items() if match}
            return {key: value for key, (value, _) in read.items()} | {"kld_stderr": read["kld"][1]}
    raise QjaxError(f"{file}: llama-perplexity printed no KLD in 8 runs, but {printed[-500:]}")


def judged(at: Place, name: str, **about: Any) -> Row:
    """A row about the file of that name: decoded to F32, and as it is."""
    file, decoded = at[name], at[f"{name}.f32.gguf"]
    run((*QJAX, "quantize", file, decoded, "F32", "--allow-requantize"))
    found, as_is = divergence(at, decoded), divergence(at, file)
    decoded.unlink()
    return about | found | {"size_bytes": file.stat().st_size, "kld_as_is": as_is["kld"]}


def made_by_us(at: Place, name: str, *command: Any, **about: Any) -> Row:
    """A row about the file that a command of ours makes, which is given its path."""
    done = run((*QJAX, *map(str, command)))
    cost = {"time_s": done.wall_s, "memory_mb": done.anonymous / 1e6}
    return judged(at, name, **about) | cost


# ── the rows ─────────────────────────────────────────────────────────────────────────────────────────

METHODS = ("rtn", "gptaq")
"""Rounders that the solver's mixture is made with."""
CANDIDATES = "Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_XS"
"""Among which it chooses: the i-quants of fewer bits, which gptaq can not round to, take most of the time."""


def of_size(at: Place, preset: str) -> list[Row]:
    """llama-quantize's preset, and what is made for a file of its size."""
    theirs = f"{preset}.gguf"
    run((llama_cpp("llama-quantize"), "--imatrix", at["imatrix.gguf"], at["f32.gguf"], at[theirs], preset))
    rows = [judged(at, theirs, size_of=preset, method="llama-quantize, llama-imatrix")]
    calibrate = ("--calibrate", at["calibration.txt"])
    target = ("--target-size", at[theirs].stat().st_size, "--formats", CANDIDATES)
    ways = {"preset, gptaq": (preset, "--method", "gptaq")}
    ways |= {f"solver, {method}": (*target, "--method", method) for method in METHODS}
    for way, options in ways.items():
        name = f"{preset}, {way}.gguf"
        command = ("quantize", at["f32.gguf"], at[name], *options, *calibrate)
        rows.append(made_by_us(at, name, *command, size_of=preset, method=way))
    for row in rows[1:]:
        row["ratio"] = row["kld"] / rows[0]["kld"]
    rows[-1]["goal"] = "0.75 (0.60)"
    if any(row["size_bytes"] > rows[0]["size_bytes"] for row in rows[1:]):
        raise QjaxError(f"{preset}: a file of ours is larger than llama-quantize's")
    return rows


def of_each(at: Place, file_type: str = "Q4_K_M") -> list[Row]:
    """A mixture by every method, beside llama-quantize's."""
    theirs = f"{file_type}.gguf"
    run((llama_cpp("llama-quantize"), "--imatrix", at["imatrix.gguf"], at["f32.gguf"], at[theirs], file_type))
    rows = [judged(at, theirs, size_of=f"{file_type}, each method", method="llama-quantize, llama-imatrix")]
    for method in EACH:
        name = f"{file_type}, {method}.gguf"
        how = ("--method", method, "--calibrate", at["calibration.txt"])
        about = {"size_of": f"{file_type}, each method", "method": method}
        rows.append(made_by_us(at, name, "quantize", at["f32.gguf"], at[name], file_type, *how, **about))
        rows[-1]["ratio"] = rows[-1]["kld"] / rows[0]["kld"]
    return rows


def trained(at: Place, file_type: str) -> list[Row]:
    """A file type as llama-quantize makes it, and after training for it."""
    plain = f"{file_type}-plain.gguf"
    run((llama_cpp("llama-quantize"), at["f32.gguf"], at[plain], file_type))
    rows = [judged(at, plain, size_of=file_type, method="llama-quantize")]
    name = f"{file_type}-qat.gguf"
    command = ("train", at["f32.gguf"], at[name], "--qat", file_type, "-f", "tales", "--lr", TRAINED[file_type])
    rows.append(made_by_us(at, name, *command, size_of=file_type, method="qat"))
    lost, left = (row["ppl"] - row["base"] for row in rows)
    rows[1] |= {"ratio": rows[1]["kld"] / rows[0]["kld"], "recovered": 1 - left / lost, "goal": "50 % (80 %)"}
    return rows


SECTIONS: Mapping[str, Callable[[Place], list[Row]]] = {
    **{preset: lambda at, preset=preset: of_size(at, preset) for preset in PRESETS},
    "each": of_each,
    **{f"qat-{name}": lambda at, name=name: trained(at, name) for name in TRAINED},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--json", type=Path, help="write the rows there, with the device's name")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        prepare(Place(arguments.folder))
        for section in progress(arguments.rows, desc="methods", unit="section"):
            rows += SECTIONS[section](Place(arguments.folder))
            print(f"\n{side_by_side.table(rows, COLUMNS)}", flush=True)
    except QjaxError as error:
        print(error, file=sys.stderr)
        return 2
    side_by_side.write(arguments.json, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
