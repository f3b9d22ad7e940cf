"""What all steps of one run share."""

from dataclasses import dataclass
from datetime import date

from demo.replay import Calendar
from demo.terminal import Terminal
from demo.workspace import Workspace
from spark_export.report import Report
from spark_export.views import ViewsFile


@dataclass(frozen=True)
class Setting:
    """The days, the views, the files and the terminal of one run; each measurement takes `measure_seconds`."""

    calendar: Calendar
    views_file: ViewsFile
    workspace: Workspace
    terminal: Terminal
    measure_seconds: float


def named(day: date) -> str:
    """A day as people write it."""
    return f"{day:%a} {day.day} {day:%b %Y}"


def shipped(report: Report) -> int:
    """How many rows and tombstones an export shipped."""
    return report.new + report.changed + report.refreshed + report.removed
