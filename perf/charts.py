"""Draw a chart of each kept finding that is a curve:
`python -m perf.charts perf/results/FILE.jsonl … --to docs/charts`.

If a finding has points in its detail (see `perf.report.Finding`), its chart is one SVG, named after its case. If there
are several runs of a case, only the last run is drawn. The same findings give the same bytes. The colours are visible
on white and on black, and there is no background.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from perf.report import Finding, read_lines

TEXT = "#7d8590"
SERIES = ("#388bfd", "#d18616", "#e5534b", "#57ab5a")
WIDE = 20
"""The least ratio of the greatest value to the least value for which an axis is logarithmic."""

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "shoal",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": TEXT,
    "grid.alpha": 0.25,
}


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--to", "directory", required=True, type=click.Path(path_type=Path), help="Where the SVGs go.")
def main(files: tuple[Path, ...], directory: Path) -> None:
    """Draw a chart of each finding that is a curve."""
    curves = {
        chart_name(finding): finding
        for file in files
        for finding in read_lines(file).findings
        if finding.detail.keys() >= {"points", "x", "unit"}
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, finding in curves.items():
        path = directory / f"{name}.svg"
        draw(finding, path)
        click.echo(path)


def chart_name(finding: Finding) -> str:
    """Return the file name for a finding: its case in lower case, with hyphens between words."""
    return re.sub(r"[^a-z0-9]+", "-", finding.case.lower().replace(",", "")).strip("-")


def draw(finding: Finding, path: Path) -> None:
    """Draw one curve, or several over the same points."""
    points: list[dict[str, Any]] = finding.detail["points"]
    xs = [point["x"] for point in points]
    series = {name: [point[name] for point in points] for name in points[0] if name != "x"}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        for (name, ys), colour in zip(series.items(), SERIES, strict=False):
            axes.plot(xs, ys, color=colour, label=name, marker="o", markersize=4, linewidth=1.6)
        axes.set_title(finding.case, loc="left", fontsize=10)
        axes.set_xlabel(finding.detail["x"])
        axes.set_ylabel(finding.detail["unit"], rotation=0, ha="right", va="top", y=1.0)
        _scale_x(axes, xs)
        _scale_y(axes, [y for ys in series.values() for y in ys])
        axes.grid(axis="y")
        if len(series) > 1:
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _scale_x(axes: Axes, xs: Sequence[float]) -> None:
    if _is_wide(xs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(xs))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(left=0)
    _label_plainly(axes.xaxis)


def _scale_y(axes: Axes, ys: Sequence[float]) -> None:
    if _is_wide(ys):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    _label_plainly(axes.yaxis)


def _is_wide(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) >= WIDE * min(values)


def _label_plainly(axis: Axis) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))


def _plain(value: float) -> str:
    """Return a number as text without powers of ten, such as 0.01, 1,000 or 20 M."""
    if value >= 1_000_000:
        return f"{value / 1_000_000:g} M"
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


if __name__ == "__main__":
    main()
