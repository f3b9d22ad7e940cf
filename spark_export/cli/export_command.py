"""The commands `shoal export` and `shoal feast-views`."""

from pathlib import Path

import click

from shoal.engine.cli.terminal import say, say_json
from shoal.engine.feast.repository import open_repository
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import FORMATS, NEWEST_FORMAT, FormatVersion
from shoal.spark_export.feast.views import feast_views, write_views
from shoal.spark_export.report import Report
from shoal.spark_export.views.definition import load_views

WRITE_FORMAT = click.option(
    "--format",
    "write_format",
    type=click.IntRange(FORMATS[0], NEWEST_FORMAT),
    default=NEWEST_FORMAT,
    show_default=True,
    help="Publish in this format of the export root, for nodes that cannot read a newer format: see docs/upgrading.md.",
)


MASTER = click.option("--master", metavar="URL", help="Where Spark runs; local[*] if not given.")
PACKAGES = click.option(
    "--package",
    "packages",
    multiple=True,
    metavar="G:A:V",
    help="A package for Spark, for example for Kafka, Avro or Delta; may be repeated.",
)


@click.command("export")
@click.option("--views", "views_path", required=True, type=click.Path(path_type=Path), help="The views.yaml to export.")
@click.option(
    "--to",
    "address",
    required=True,
    metavar="ROOT",
    help="The export root: a directory, or s3://BUCKET/PREFIX; created if missing.",
)
@click.option("--view", "view_names", multiple=True, metavar="NAME", help="Export only this view; may be repeated.")
@click.option("--full", is_flag=True, help="Publish full snapshots, even where a delta would be enough.")
@click.option(
    "--allow-removals", is_flag=True, help="Publish even if a view loses more rows or values than its limit allows."
)
@WRITE_FORMAT
@MASTER
@PACKAGES
@click.option("--json", "as_json", is_flag=True, help="Print the reports as one JSON list.")
def export_command(
    views_path: Path,
    address: str,
    view_names: tuple[str, ...],
    full: bool,
    allow_removals: bool,
    write_format: FormatVersion,
    master: str | None,
    packages: tuple[str, ...],
    as_json: bool,
) -> None:
    """Publish the changes in the views' sources.

    The first export of a view is a snapshot of all its rows. Later exports are deltas with the rows that are new,
    changed or removed since the previous export. If no row of a view changed but the source is newer, the export
    publishes a delta without rows, so that nodes know the new age of the rows.

    If an export would remove more than 20% of a view's rows, or of a feature's values, it publishes nothing for that
    view, exports the other views, and ends with exit code 1. Set max_removed for the view in views.yaml to change the
    limit, or use --allow-removals to lift it for one export. If a view has fewer than 1,000 rows, any of them may be
    removed, but not all.

    The command lists on stderr the views of the root that views.yaml no longer names. Nodes serve such a view until
    `shoal drop-view` removes it.

    If started by spark-submit, the export runs in the session of spark-submit.
    """
    views_file = load_views(views_path)
    root = ExportRoot(address, write_format=write_format)
    root.check_may_be_root()

    # Spark is imported only now: other commands do not need it, and a wrong views.yaml is reported without it.
    from shoal.spark_export.source.session import spark_session

    spark = spark_session(master, packages)

    from shoal.spark_export.exporter import export_each, unnamed_views

    reports: list[Report] = []
    for view in views_file.views:
        if view.source is None and view.name in (view_names or [view.name]) and not as_json:
            say(f"{view.name}: only its definition is published; `shoal stream` publishes its rows")
    try:
        for report in export_each(
            views_file,
            root,
            view_names=view_names or None,
            full=full,
            allow_removals=allow_removals,
            spark=spark,
        ):
            reports.append(report)
            if not as_json:
                say(_sentence(report))
    finally:
        if as_json:
            say_json([report.to_dict() for report in reports])
    for name in unnamed_views(views_file, root):
        say(
            f"{root} has view {name}, but {views_path} does not name it: nodes still serve its last published rows. "
            f"Put the view back, or remove it: `shoal drop-view {name} --root {root}`",
            err=True,
        )


@click.command("feast-views", short_help="Make a views.yaml from a Feast repository.")
@click.argument("repository", metavar="REPO")
@click.option("--output", type=click.Path(path_type=Path), help="The views.yaml to write; stdout if not given.")
@click.option("--project", metavar="NAME", help="The project, if REPO is a registry with several projects.")
@click.option("--cast", is_flag=True, help="Cast columns to their declared types if their source types are unknown.")
@click.option("--skip", "accepted", multiple=True, metavar="NAME", help="Leave out this definition; may be repeated.")
@click.option("--skip-unmappable", is_flag=True, help="Leave out every definition that views.yaml cannot express.")
def feast_views_command(
    repository: str,
    output: Path | None,
    project: str | None,
    cast: bool,
    accepted: tuple[str, ...],
    skip_unmappable: bool,
) -> None:
    """Make a views.yaml from a Feast repository, for use with `shoal export`.

    REPO is a directory with a feature_store.yaml, or a registry: a file, or an address that Feast knows. The command
    reads the definitions that were applied to the registry.

    If views.yaml cannot express some definitions, the command lists them on stderr and writes nothing. A definition
    named with --skip is left out instead, and any other still makes the command fail. So an unattended job loses only
    definitions that somebody has accepted to lose. With --skip-unmappable, all such definitions are left out.
    """
    made = feast_views(open_repository(repository, project), repository, cast=cast)
    if not skip_unmappable:
        made.check_complete(accepted)
    if output is None:
        click.echo(made.text, nl=False)
    else:
        try:
            write_views(made, output)
        except OSError as error:
            raise click.UsageError(f"cannot write {output}: {error.strerror}") from None
    for loss in made.losses:
        say(f"left out: {loss}", err=True)
    for name in dict.fromkeys(accepted):
        if name not in [loss.name for loss in made.losses]:
            say(f"--skip {name}: no definition with that name had to be left out", err=True)


def _sentence(report: Report) -> str:
    counts = {
        "new": report.new,
        "changed": report.changed,
        "refreshed": report.refreshed,
        "removed": report.removed,
        "late": report.late,
        "unchanged": report.unchanged,
        "duplicates": report.duplicates,
    }
    summary = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    summary = summary or (f"{report.rows_read:,} rows read" if report.refused else "no rows")
    if report.refused:
        more = f" and {len(report.refused) - 1} more" if len(report.refused) > 1 else ""
        outcome = f"refused, still at seq {report.seq}: {report.refused[0]}{more}"
    elif report.kind is None:
        outcome = f"nothing to publish, still at seq {report.seq}"
    else:
        reason = f" ({report.reason})" if report.reason else ""
        outcome = f"{report.kind} {report.seq}{reason}, {report.bytes / 1e6:,.1f} MB"
    if report.not_compared:
        summary += f"; no earlier entry has {' or '.join(report.not_compared)} to compare with"
    return f"{report.view}: {outcome}: {summary}; {report.seconds:.1f} s"
