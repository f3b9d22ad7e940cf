"""The state that all steps of a run share."""

from dataclasses import dataclass
from datetime import date

from demo.replay import Calendar
from demo.terminal import Terminal
from demo.workspace import Workspace
from shoal.spark_export.report import Report
from shoal.spark_export.views.definition import ViewsFile


@dataclass(frozen=True)
class Setting:
    """The days, the views, the files and the terminal of one run; each measurement takes `measure_seconds`."""

    calendar: Calendar
    views_file: ViewsFile
    workspace: Workspace
    terminal: Terminal
    measure_seconds: float


def named(day: date) -> str:
    """Return a day as readable text, such as "Sun 22 Dec 2013"."""
    return f"{day:%a} {day.day} {day:%b %Y}"


def shipped(report: Report) -> int:
    """Return the number of rows and tombstones that an export shipped."""
    return report.new + report.changed + report.refreshed + report.removed
