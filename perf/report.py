"""What a benchmark found: printed as a table, kept as JSON lines with the machine it ran on."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """One figure: what was measured, how much it was, and the bar it is held to (`at_most` or `at_least`)."""

    case: str
    what: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool | None:
        """Whether the bar is met; None where there is none."""
        if self.at_most is not None:
            return self.value <= self.at_most
        if self.at_least is not None:
            return self.value >= self.at_least
        return None


def machine() -> dict[str, Any]:
    """The machine, as far as it bears on figures."""
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


def print_table(findings: Sequence[Finding]) -> None:
    """The findings as a table."""
    table = Table(box=None, pad_edge=False)
    for name in ("case", "what", "value", "unit", "bar", "met"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for finding in findings:
        bar = ""
        if finding.at_most is not None:
            bar = f"≤ {finding.at_most:g}"
        elif finding.at_least is not None:
            bar = f"≥ {finding.at_least:g}"
        met = {None: "", True: "yes", False: "NO"}[finding.met]
        table.add_row(finding.case, finding.what, f"{finding.value:.4g}", finding.unit, bar, met)
    Console(width=160, highlight=False).print(table)


def write_lines(findings: Sequence[Finding], directory: Path, *, small: bool) -> Path:
    """Keep the findings of a run as JSON lines, the machine first."""
    directory.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC)
    path = directory / f"{started:%Y%m%dT%H%M%SZ}{'-small' if small else ''}.jsonl"
    with path.open("w") as stream:
        stream.write(json.dumps({"at": started.isoformat(), "small": small, "machine": machine()}) + "\n")
        for finding in findings:
            stream.write(json.dumps(asdict(finding) | {"met": finding.met}) + "\n")
    return path
