"""The commands `shoal export` and `shoal feast-views`."""

from pathlib import Path

import click

from engine.export_root import ExportRoot
from engine.feast_repository import open_repository
from engine.manifest import FORMATS, NEWEST_FORMAT, FormatVersion
from engine.terminal import say, say_json
from spark_export.feast_views import feast_views, write_views
from spark_export.report import Report
from spark_export.views import load_views

WRITE_FORMAT = click.option(
    "--format",
    "write_format",
    type=click.IntRange(FORMATS[0], NEWEST_FORMAT),
    default=NEWEST_FORMAT,
    show_default=True,
    help="Publish in this format of the export root, for nodes that cannot read a newer one: see docs/upgrading.md.",
)


MASTER = click.option("--master", metavar="URL", help="Where Spark runs; local[*] if not given.")
PACKAGES = click.option(
    "--package",
    "packages",
    multiple=True,
    metavar="G:A:V",
    help="A package for Spark, as for Kafka, Avro or Delta; may be given again.",
)


@click.command("export")
@click.option("--views", "views_path", required=True, type=click.Path(path_type=Path), help="The views.yaml to export.")
@click.option(
    "--to",
    "address",
    required=True,
    metavar="ROOT",
    help="The export root, made if new: a directory, or s3://BUCKET/PREFIX.",
)
@click.option("--view", "view_names", multiple=True, metavar="NAME", help="Only this view; may be given again.")
@click.option("--full", is_flag=True, help="Publish full snapshots, even where a delta would do.")
@click.option(
    "--allow-removals", is_flag=True, help="Publish this once, however many rows or values a view loses by it."
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
    """Publish what changed in the views' sources.

    The first export of a view is a snapshot of all its rows; later ones are deltas with what is new, changed or gone
    since the export before. If no row of a view changed, a delta without rows says so, and how old the rows are now.

    An export that would remove more than 20% of a view's rows, or of a feature's values, publishes nothing of that view
    and ends with exit code 1. The view's max_removed in views.yaml sets another share, and --allow-removals lifts the
    limit once. Of fewer than 1,000 rows any may be removed, but not all. Other views are exported.

    The command lists on stderr the views of the root that views.yaml no longer names: nodes serve such a view until
    `shoal drop-view` removes it.

    Started by spark-submit, the export runs in the session that it sets up.
    """
    views_file = load_views(views_path)
    root = ExportRoot(address, write_format=write_format)
    root.check_may_be_root()

    # Spark is imported only now: no other command needs it, nor an export whose views.yaml is wrong.
    from spark_export.session import spark_session

    spark = spark_session(master, packages)

    from spark_export.exporter import export_each, unnamed_views

    reports: list[Report] = []
    for view in views_file.views:
        if view.source is None and view.name in (view_names or [view.name]) and not as_json:
            say(f"{view.name}: only its definition is published; its rows come by `shoal stream`")
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
            f"{root} has view {name}, which {views_path} does not name: nodes serve it as it was published last. Put "
            f"it back, or remove it: `shoal drop-view {name} --root {root}`",
            err=True,
        )


@click.command("feast-views", short_help="Make a views.yaml of what a Feast repository defines.")
@click.argument("repository", metavar="REPO")
@click.option("--output", type=click.Path(path_type=Path), help="The views.yaml to write; stdout if not given.")
@click.option("--project", metavar="NAME", help="The project, if REPO is a registry that holds several.")
@click.option("--cast", is_flag=True, help="Cast columns to the declared types where it is unknown if they need it.")
@click.option("--skip", "accepted", multiple=True, metavar="NAME", help="Leave this out; may be given again.")
@click.option("--skip-unmappable", is_flag=True, help="Leave out whatever views.yaml cannot say.")
def feast_views_command(
    repository: str,
    output: Path | None,
    project: str | None,
    cast: bool,
    accepted: tuple[str, ...],
    skip_unmappable: bool,
) -> None:
    """Make a views.yaml of what a Feast repository defines, so that `shoal export` publishes it.

    REPO is a directory with a feature_store.yaml, or a registry: a file, or an address that Feast knows. What is read
    is what was applied to the registry.

    If something there cannot be said in views.yaml, it is listed on stderr, and nothing is written. What is named by
    --skip is left out instead, and anything else still fails: so that a job that runs by itself loses only what
    somebody has accepted. With --skip-unmappable nothing fails.
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
            say(f"--skip {name}: nothing of that name had to be left out", err=True)


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
    told = ", ".join(f"{count:,} {name}" for name, count in counts.items() if count)
    told = told or (f"{report.rows_read:,} rows read" if report.refused else "no rows")
    if report.refused:
        more = f" and {len(report.refused) - 1} more" if len(report.refused) > 1 else ""
        outcome = f"refused, still at seq {report.seq}: {report.refused[0]}{more}"
    elif report.kind is None:
        outcome = f"nothing to publish, still at seq {report.seq}"
    else:
        reason = f" ({report.reason})" if report.reason else ""
        outcome = f"{report.kind} {report.seq}{reason}, {report.bytes / 1e6:,.1f} MB"
    if report.not_compared:
        told += f"; no earlier entry has {' or '.join(report.not_compared)} to compare with"
    return f"{report.view}: {outcome}: {told}; {report.seconds:.1f} s"
