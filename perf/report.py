"""The findings of benchmarks: print them as a table, and keep them as JSON lines together with the machine."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One figure: what was measured, the value and its unit, and the target for the value, which is called its bar
    (`at_most` or `at_least`).

    A `detail` with `points` is a curve for `perf.charts`. Each point has an `x` and the values of one or several series
    by name, as in {"x": 1000, "p50": 1.2, "p99": 3.4}. Next to `points`, `x` describes the x axis, and `unit` is the
    unit of the values.
    """

    case: str
    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def bar(self) -> str:
        """The bar as text; empty if the finding has no bar."""
        if self.at_most is not None:
            return f"≤ {self.at_most:.3g}"
        return f"≥ {self.at_least:.3g}" if self.at_least is not None else ""

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None if the finding has no bar."""
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


@dataclass(frozen=True)
class Run:
    """A run of the benchmarks: its time, command, machine and findings."""

    at: datetime
    command: str
    machine: dict[str, Any]
    findings: tuple[Finding, ...]


def machine() -> dict[str, Any]:
    """Return the properties of this machine that affect the figures."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def figure(value: float) -> str:
    """Return a number as text, with three significant digits and a comma between thousands."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def print_table(findings: Sequence[Finding]) -> None:
    """Print the findings as a table."""
    table = Table(box=None, pad_edge=False)
    for name in ("case", "what", "value", "unit", "bar", "met"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for finding in findings:
        met = {None: "", True: "yes", False: "NO"}[finding.met]
        table.add_row(finding.case, finding.what, figure(finding.value), finding.unit, finding.bar, met)
    Console(width=160, highlight=False).print(table)


def write_lines(findings: Sequence[Finding], directory: Path, *, small: bool, command: str) -> Path:
    """Write the findings of a run to a new file as JSON lines, the machine first. Return the path of the file."""
    directory.mkdir(parents=True, exist_ok=True)
    now = datetime.now(UTC)
    path = directory / f"{now:%Y%m%dT%H%M%SZ}{'-small' if small else ''}.jsonl"
    with path.open("w") as stream:
        head = {"at": now.isoformat(), "small": small, "command": command, "machine": machine()}
        stream.write(json.dumps(head) + "\n")
        for finding in findings:
            stream.write(json.dumps(asdict(finding) | {"met": finding.met}) + "\n")
    return path


def read_lines(path: Path) -> Run:
    """Read a run from a file of `write_lines`."""
    head, *lines = (json.loads(line) for line in path.read_text().splitlines())
    names = [name.name for name in fields(Finding)]
    findings = tuple(Finding(**{name: line[name] for name in names}) for line in lines)
    command = head.get("command", "python -m perf --small" if head["small"] else "python -m perf")
    return Run(datetime.fromisoformat(head["at"]), command, head["machine"], findings)
