"""Run the benchmarks: `python -m perf`, or `python -m perf --small` to check that they run."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import click

from perf import scale as scales
from perf.cases import (
    arrivals,
    beside_writer,
    client,
    costs,
    dynamodb,
    export,
    freshness,
    http,
    in_process,
    loading,
    many,
    nodes,
    nodes_client,
    overload,
    pushes,
    rollout,
    scrub,
    shapes,
    sizes,
    starts,
    stream,
    swap,
)
from perf.report import Finding, print_table, write_lines
from perf.scale import Scale
from perf.soak import run as soak

CASES: dict[str, Callable[[Scale], list[Finding]]] = {
    "in-process": in_process.run,
    "http": http.run,
    "in-process-many-rows": in_process.run_many_rows,
    "overlays": shapes.run_overlays,
    "views": shapes.run_views,
    "arrivals": arrivals.run,
    "rising-load": arrivals.run_rising,
    "load": loading.run,
    "sizes": sizes.run_stores,
    "delta-sizes": sizes.run_deltas,
    "freshness": freshness.run,
    "beside-writer": beside_writer.run,
    "client": client.run,
    "overload": overload.run,
    "pushes": pushes.run,
    "stream": stream.run,
    "costs": costs.run,
    "rollout": rollout.run,
    "soak": soak.run,
    "start": starts.run,
    "swap": swap.run,
    "export": export.run,
    "dynamodb": dynamodb.run,
}
ON_REQUEST: dict[str, Callable[[Scale], list[Finding]]] = {
    "hundred-million": many.run,
    "nodes": nodes.run,
    "nodes-client": nodes_client.run,
    "scrub": scrub.run,
}
"""Cases that run only when they are named. `hundred-million` is large; `nodes` and `nodes-client` need root, `nodes`
also needs HAProxy; `scrub` takes long."""


@click.command()
@click.option("--small", is_flag=True, help="Small sizes, for function only: the figures mean nothing.")
@click.option(
    "--case", "names", multiple=True, type=click.Choice([*CASES, *ON_REQUEST]), help="Only this; may be given again."
)
@click.option("--data", type=click.Path(path_type=Path), help="Keep the data sets here, for the next run.")
@click.option("--rows", type=int, help="Rows of a store, where a case does not want more; 1,000,000 if not given.")
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path(__file__).with_name("results"), show_default=True
)
def main(small: bool, names: tuple[str, ...], data: Path | None, rows: int | None, results: Path) -> None:
    """Measure Shoal and its alternatives in one run. Every answer is checked before it is timed."""
    with tempfile.TemporaryDirectory(prefix="shoal-perf-") as temporary:
        directory = data or Path(temporary)
        directory.mkdir(parents=True, exist_ok=True)
        scale = scales.small(directory) if small else scales.full(directory)
        if rows is not None:
            scale = replace(scale, rows=rows)
        findings: list[Finding] = []
        try:
            for name in names or CASES:
                click.echo(f"{name} … ", err=True, nl=False)
                begun = time.monotonic()
                findings += (CASES | ON_REQUEST)[name](scale)
                click.echo(f"{time.monotonic() - begun:.0f} s", err=True)
        finally:
            # If a case fails, the findings of the earlier cases are still printed and kept.
            print_table(findings)
            click.echo(write_lines(findings, results, small=small, command=_command(small, names, rows)))


def _command(small: bool, names: tuple[str, ...], rows: int | None) -> str:
    """Return this run's command without its options for directories."""
    options = [*(["--small"] if small else []), *(f"--case {name}" for name in names)]
    return " ".join(["python -m perf", *options, *([f"--rows {rows}"] if rows is not None else [])])


if __name__ == "__main__":
    main()
