"""Print kept findings as a Markdown table: `python -m perf.markdown perf/results/FILE.jsonl …`."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
def main(files: tuple[Path, ...]) -> None:
    """Print the findings of runs, the machine first."""
    for file in files:
        run, *findings = (json.loads(line) for line in file.read_text().splitlines())
        machine = run["machine"]
        click.echo(f"{run['at'][:10]}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB\n")
        click.echo("| case | what | value | bar | met |\n|---|---|---:|---|---|")
        for finding in findings:
            bar = f"≤ {finding['at_most']:.3g}" if finding["at_most"] is not None else ""
            if finding["at_least"] is not None:
                bar = f"≥ {finding['at_least']:.3g}"
            met = {None: "", True: "yes", False: "no"}[finding["met"]]
            value = f"{finding['value']:.3g} {finding['unit']}"
            click.echo(f"| {finding['case']} | {finding['what']} | {value} | {bar} | {met} |")
        click.echo()


if __name__ == "__main__":
    main()
