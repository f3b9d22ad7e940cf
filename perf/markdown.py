"""Kept findings as Markdown tables: `python -m perf.markdown perf/results/FILE.jsonl …`; see `--help`."""

from pathlib import Path

import click

from perf.report import Finding, Run, figure, read_lines

BEGIN, END = "<!-- bench -->", "<!-- /bench -->"


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--bars", is_flag=True, help="Only findings that are held to a bar.")
@click.option(
    *("--into", "page"),
    type=click.Path(exists=True, path_type=Path),
    help=f"Put the tables into this Markdown file, in place of what stands between {BEGIN} and {END}.",
)
def main(files: tuple[Path, ...], bars: bool, page: Path | None) -> None:
    """Print the findings of each run as a table. The table begins with the machine of the run."""
    tables = "\n\n".join(table(run, bars=bars) for run in map(read_lines, files) if _chosen(run, bars=bars))
    if page is None:
        click.echo(tables)
        return
    put_into(page, tables, BEGIN, END)


def put_into(page: Path, tables: str, begin: str, end: str) -> None:
    """Replace the text between two marks in a Markdown file with tables.

    Raises:
        ClickException: the file does not contain the marks.
    """
    before, found, rest = page.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise click.ClickException(f"{page} has no {begin} with an {end} after it; put them where the tables belong")
    page.write_text(f"{before}{begin}\n{tables}\n{end}{after}")


def table(run: Run, *, bars: bool) -> str:
    """Return a run's findings as a table. With `bars`, the table has only the findings that have a target (a bar)."""
    findings = _chosen(run, bars=bars)
    machine = run.machine
    met = [finding.met for finding in findings if finding.met is not None]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; {run.at:%Y-%m-%d}; `{run.command}`; "
        f"{sum(met)} of {len(met)} bars met:",
        "",
        "| case | what | found | bar |",
        "|---|---|---:|---:|",
    ]
    case = None
    for finding in findings:
        # A case with several findings is named only in its first row.
        lines.append(f"| {finding.case if finding.case != case else ''} | {finding.what} | {_cells(finding)} |")
        case = finding.case
    return "\n".join(lines)


def _chosen(run: Run, *, bars: bool) -> list[Finding]:
    return [finding for finding in run.findings if finding.bar or not bars]


def _cells(finding: Finding) -> str:
    found = f"{figure(finding.value)} {finding.unit}"
    if finding.met is False:
        return f"**{found}** | **missed:** {finding.bar}"
    return f"{found} | {finding.bar}"


if __name__ == "__main__":
    main()
