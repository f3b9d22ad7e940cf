"""Publish the changes in the sources of views. Each run publishes one entry per view, or none if nothing changed."""

from collections.abc import Iterable, Iterator
from contextlib import suppress

from pyspark.sql import SparkSession

from shoal.engine.base.errors import DefinitionError, ManifestInvalid, RemovalRefused, SparkFailed
from shoal.engine.format.schema import FeatureService
from shoal.engine.root.export_root import ExportRoot
from shoal.spark_export.publication.staging import job_name, write_errors_named
from shoal.spark_export.report import Report
from shoal.spark_export.source.session import export_session
from shoal.spark_export.source.spark_errors import raised_as
from shoal.spark_export.stream.log import publish_definition
from shoal.spark_export.view_export import export_view
from shoal.spark_export.views.definition import ViewDefinition, ViewsFile

_LISTED = 5
"""The greatest number of losses per view that an error message lists."""


def export(
    views_file: ViewsFile,
    root: ExportRoot,
    *,
    view_names: Iterable[str] | None = None,
    full: bool = False,
    allow_removals: bool = False,
    spark: SparkSession,
) -> list[Report]:
    """Export views in the order of the file, then publish the feature services. Return one report per exported view.

    A view with a stream and no source gets no report. If its log is empty, publish its definition.

    Args:
        view_names: the views to export; None for all.
        full: publish a snapshot even where a delta would be enough.
        allow_removals: publish even if a view would lose more rows, or more values of a feature, than its limit allows.

    Raises:
        DefinitionError: a name in `view_names` is not in the file.
        SourceError: a source does not fit its view; neither that view nor any later view was published.
        SchemaChangeRefused: the schema of a view changed, and stored rows cannot be read with the new schema.
        RemovalRefused: some views would lose more than their limit allows. Neither these views nor the services were
            published; all other views were.
        LogTaken: a stream published the newest entry of a view.
        PublicationLost: another exporter published the same seq first.
        PathsSwapped: the root is a store.
        RootNotWritable: the file system reported an error.
        SparkFailed: Spark reported an error.
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
    """Export views like `export`, and yield each report as soon as its view is published or refused."""
    root.check_may_be_root()
    with raised_as(SparkFailed, "Spark does not answer"):
        session = export_session(spark)
    refused: list[Report] = []
    for view in chosen(views_file, view_names):
        if view.source is None:
            publish_definition(view, root, job_name(session))
            continue
        with raised_as(SparkFailed, f"view {view.name!r}: Spark failed"):
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
    them = "this view" if len(views) == 1 else "these views"
    return RemovalRefused(
        f"{'; '.join(views)}; nothing was published for {them}; correct the source, or, if the loss is intended, "
        f"export once with --allow-removals, or set max_removed in views.yaml"
    )


def chosen(views_file: ViewsFile, names: Iterable[str] | None) -> list[ViewDefinition]:
    """Return the views with these names, or all views if `names` is None.

    Raises:
        DefinitionError: the file does not define a name.
    """
    defined = {view.name: view for view in views_file.views}
    wanted = set(defined if names is None else names)
    if unknown := sorted(wanted - set(defined)):
        raise DefinitionError(f"no view {unknown[0]!r} is defined; the defined views are: {', '.join(defined)}")
    return [view for view in views_file.views if view.name in wanted]


def unnamed_views(views_file: ViewsFile, root: ExportRoot) -> list[str]:
    """Return the views of a root that are missing from the file. They were renamed or removed in the file, but nodes
    still serve them."""
    return sorted(set(root.views()) - {view.name for view in views_file.views})


def publish_services(views_file: ViewsFile, root: ExportRoot) -> None:
    """Publish the feature services, unless the root already has the same list."""
    published: tuple[FeatureService, ...] | None = None
    # A damaged list is repaired by publishing it again.
    with suppress(ManifestInvalid):
        published = root.services()
    if published != views_file.services:
        with write_errors_named(root):
            root.publish_services(views_file.services)
