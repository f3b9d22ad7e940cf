"""Soak a server: `python -m perf.soak --seconds 3600 --samples FILE`; see `--help`."""

import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import click

from perf.markdown import table
from perf.report import read_lines, write_lines
from perf.soak.run import plan, soak


@click.command()
@click.option("--seconds", default=300.0, show_default=True, help="How long.")
@click.option("--rows", default=200_000, show_default=True, help="Rows of each of the two views.")
@click.option("--samples", type=click.Path(path_type=Path), help="Write each sample to this file, a line of JSON.")
@click.option("--data", type=click.Path(path_type=Path), help="Keep store, root and log in this empty directory.")
@click.option(
    "--results", type=click.Path(path_type=Path), default=Path(__file__).parent.with_name("results"), show_default=True
)
def main(seconds: float, rows: int, samples: Path | None, data: Path | None, results: Path) -> None:
    """Put a server under load for a long time, and find out which of its resources grow.

    The exit code is 1 if memory, descriptors, threads or the store grow, or if a request failed or was answered
    wrongly.
    """
    with ExitStack() as closing:
        directory = data or Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="shoal-soak-")))
        directory.mkdir(parents=True, exist_ok=True)
        lines = closing.enter_context(samples.open("w")) if samples is not None else None
        findings = soak(directory, plan(seconds, rows), lines)
    path = write_lines(findings, results, small=False, command=f"python -m perf.soak --seconds {seconds:g}")
    click.echo(table(read_lines(path), bars=False))
    click.echo(path)
    if any(finding.met is False for finding in findings):
        sys.exit(1)


if __name__ == "__main__":
    main()
