"""Publish what changed in the sources of views: for each view and run one entry, or none if nothing changed."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from pyspark.sql import SparkSession

from engine.errors import DefinitionError, ManifestInvalid, RemovalRefused, SparkFailed
from engine.export_root import ExportRoot
from engine.schema import FeatureService
from spark_export.publication import job_name, writing
from spark_export.report import Report
from spark_export.session import export_session
from spark_export.spark_errors import raised_as
from spark_export.stream.log import publish_definition
from spark_export.view_export import export_view
from spark_export.views import ViewDefinition, ViewsFile

_LISTED = 5
"""How many of a view's losses an error names."""


def export(
    views_file: ViewsFile,
    root: ExportRoot,
    *,
    view_names: Iterable[str] | None = None,
    full: bool = False,
    allow_removals: bool = False,
    spark: SparkSession,
) -> list[Report]:
    """Export views, in the order of the file, and then the feature services. For a view that only streams, publish its
    definition if its log has not begun, and return no report.

    Args:
        view_names: which views; None for all.
        full: publish snapshots even where a delta would do.
        allow_removals: publish although a view would lose more of its rows, or of a feature's values, than its limit
            allows.

    Raises:
        DefinitionError: a name in `view_names` is not in the file.
        SourceError: a source does not fit its view; nothing of that view, and no later view, was published.
        SchemaChangeRefused: a view changed in a way that stored rows cannot follow.
        RemovalRefused: views would lose more than their limit allows; nothing of them was published, nor were the
            services, but all other views were.
        LogTaken: the last to publish a view was a stream.
        PublicationLost: another exporter published the same seq first.
        PathsSwapped: the root is a store.
        RootNotWritable, SparkFailed: the file system, or Spark, gave up.
    """
    return list(
        export_each(views_file, root, view_names=view_names, full=full, allow_removals=allow_removals, spark=spark)
    )


def export_each(
    views_file: ViewsFile,
    root: ExportRoot,
    *,
    view_names: Iterable[str] | None = None,
    full: bool = False,
    allow_removals: bool = False,
    spark: SparkSession,
) -> Iterator[Report]:
    """Do as `export` does, and give each report as soon as its view is published, or refused."""
    root.check_may_be_root()
    with raised_as(SparkFailed, "Spark does not answer"):
        session = export_session(spark)
    refused: list[Report] = []
    for view in chosen(views_file, view_names):
        if view.source is None:
            publish_definition(view, root, job_name(session))
            continue
        with raised_as(SparkFailed, f"view {view.name!r}: Spark gave up"):
            report = export_view(view, root, session, full=full, allow_removals=allow_removals)
        if report.refused:
            refused.append(report)
        yield report
    if refused:
        raise _removal_refused(refused)
    publish_services(views_file, root)


def _removal_refused(reports: list[Report]) -> RemovalRefused:
    views = []
    for report in reports:
        more = f" and {len(report.refused) - _LISTED} more" if len(report.refused) > _LISTED else ""
        views.append(f"view {report.view!r}: {', '.join(map(str, report.refused[:_LISTED]))}{more}")
    them = "it" if len(views) == 1 else "them"
    return RemovalRefused(
        f"{'; '.join(views)}; nothing of {them} was published; mend the source, or, if this is meant, export once with "
        f"--allow-removals, or set max_removed in views.yaml"
    )


def chosen(views_file: ViewsFile, names: Iterable[str] | None) -> list[ViewDefinition]:
    """The views of these names, None for all; raises DefinitionError of a name that the file has not."""
    defined = {view.name: view for view in views_file.views}
    wanted = set(defined if names is None else names)
    if unknown := sorted(wanted - set(defined)):
        raise DefinitionError(f"no view {unknown[0]!r} is defined; there are {', '.join(defined)}")
    return [view for view in views_file.views if view.name in wanted]


def unnamed_views(views_file: ViewsFile, root: ExportRoot) -> list[str]:
    """Return the views of a root that the file does not name: they were renamed or removed there, and nodes still serve
    them."""
    return sorted(set(root.views()) - {view.name for view in views_file.views})


def publish_services(views_file: ViewsFile, root: ExportRoot) -> None:
    """Publish the feature services, unless the root has them."""
    published: tuple[FeatureService, ...] | None = None
    # A damaged list is mended by publishing it again.
    with suppress(ManifestInvalid):
        published = root.services()
    if published != views_file.services:
        with writing(root):
            root.publish_services(views_file.services)
