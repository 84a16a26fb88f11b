"""Questions made of tales, as files in the formats of llama-perplexity."""

import random
import re
import struct
from pathlib import Path

from qjax.data import tales

NAMES = ("Ben", "Mia", "Tom", "Lily")


def hellaswag(path: Path, n: int) -> Path:
    """The beginning of a tale; which sentence comes next, and which are those of other tales?"""
    rng, told = (
        random.Random(0),
        [re.split(r"(?<=[.!?\"]) ", " ".join(t.text.split())) for t in tales.generate(5, 4 * n)],
    )
    lines = []
    for i in range(n):
        cut = rng.randrange(2, 4)
        endings = [told[4 * i + j][cut] for j in range(4)]
        if len(set(endings)) < 4:
            endings = [f"{ending} {'So it was. ' * j}".strip() for j, ending in enumerate(endings)]
        right = rng.randrange(4)
        endings.insert(right, endings.pop(0))
        lines += [" ".join(told[4 * i][:cut]), str(right), *endings]
    path.write_text("\n".join(lines) + "\n")
    return path


def winogrande(path: Path, n: int) -> Path:
    """Who is it of two, in a sentence of a tale that names somebody?  The last line is empty: llama-perplexity leaves
    out a task that ends with the file."""
    rng, lines = random.Random(1), []
    for tale in tales.generate(6, 20 * n):
        sentences = re.split(r"(?<=[.!?]) ", " ".join(tale.text.split()).replace('"', ""))
        names = re.findall(r"named (\w+)", tale.text)
        for sentence in sentences[1:]:
            if names and re.search(rf"\b{names[0]}\b.{{25}}", sentence) and len(lines) < n:
                gap = re.sub(rf"\b{names[0]}\b", "_", sentence, count=1)
                other = next(name for name in NAMES if name != names[0])
                right = rng.randrange(2)
                choices = [other, names[0]] if right else [names[0], other]
                lines.append(f'{len(lines)},"{sentences[0]} {gap}",{choices[0]},{choices[1]},{right + 1}')
                break
    assert len(lines) == n
    path.write_text("\n".join(lines) + "\n\n")
    return path


def _string(text: str) -> bytes:
    return struct.pack("<I", len(text.encode())) + text.encode()


def _answers(answers: list[str], right: int) -> bytes:
    labels = [int(i == right) for i in range(len(answers))]
    return struct.pack("<I", len(answers)) + b"".join(map(_string, answers)) + struct.pack(f"<{len(labels)}i", *labels)


def multiple_choice(path: Path, questions: list[tuple[str, list[str], int]]) -> Path:
    """(question, answers, number of the right one) in the binary format."""
    tasks = [
        _string(question) + _answers(answers, right) + struct.pack("<I", 0) for question, answers, right in questions
    ]
    at, positions = 4 + 4 * len(tasks), []
    for task in tasks:
        positions.append(at)
        at += len(task)
    path.write_bytes(struct.pack(f"<I{len(tasks)}I", len(tasks), *positions) + b"".join(tasks))
    return path
