"""What long runs did, as a table and in JSON; and which lines of the readers they reach."""

import json
import platform
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

from . import guided
from .running import Finding, runner
from .targets import TARGETS

MIN_EXECUTIONS = 1000
"""of each target in a run"""


def fuzz(names: Sequence[str] | None, executions: int, jobs: int, folder: Path, summary: Path | None) -> int:
    """Runs targets, ``jobs`` at a time, prints a row for each as it ends, and adds to the summary what was done."""
    chosen = {name: TARGETS[name] for name in names or TARGETS}
    total = sum(target.share for target in chosen.values())
    shares = {name: max(MIN_EXECUTIONS, round(executions * t.share / total)) for name, t in chosen.items()}
    print(f"{'target':18} {'executions':>10} {'seconds':>8} {'per s':>6} {'edges':>6}  findings")
    n_open = 0
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(guided.run, name, share, folder / name): name for name, share in shares.items()}
        for future in as_completed(running):
            name, outcome = running[future], future.result()
            findings = open_findings(name, folder / name)
            if outcome.complaint:
                findings.append(Finding("the process ended", outcome.complaint))
            n_open += len(findings)
            rate = outcome.executions / outcome.seconds
            row = f"{name:18} {outcome.executions:10} {outcome.seconds:8.0f} {rate:6.0f} {outcome.edges or 0:6}  "
            print(row + ("; ".join(f"{kind}: {detail[:300]}" for kind, detail in findings) or "none"), flush=True)
            if summary is not None:
                _add(summary, name, outcome, findings)
    return int(n_open > 0)


def open_findings(name: str, folder: Path) -> list[Finding]:
    """What of the inputs that were ever found is still a finding."""
    found = {}
    with runner(TARGETS[name]) as run:
        for path in sorted((folder / "findings").glob("*")):
            given = guided.decode(path.read_bytes())
            finding = run(given) if given else None
            if finding:
                found[finding.kind] = finding
    return list(found.values())


def _add(summary: Path, name: str, outcome: guided.Outcome, findings: list[Finding]) -> None:
    record: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else {}
    rows = record.setdefault("targets", {})
    row = rows.get(name, {"executions": 0, "seconds": 0.0, "edges": None, "findings": []})
    row["executions"] += outcome.executions
    row["seconds"] = round(row["seconds"] + outcome.seconds, 1)
    row["edges"] = max(filter(None, (row["edges"], outcome.edges)), default=None)
    row["findings"] = [finding.kind for finding in findings]
    rows[name] = row
    record["executions"] = sum(row["executions"] for row in rows.values())
    record["engine"] = f"atheris {metadata.version('atheris')}" if guided.available() else "random mutation"
    record["python"] = platform.python_version()
    summary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
