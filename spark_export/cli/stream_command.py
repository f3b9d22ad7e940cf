"""The command `shoal stream`."""

import signal
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from shoal.engine.base.errors import DefinitionError
from shoal.engine.base.server_access import ServerAccess, access_options, server_access
from shoal.engine.cli.terminal import say, say_json
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.root.manifest import FormatVersion
from shoal.spark_export.cli.export_command import MASTER, PACKAGES, WRITE_FORMAT
from shoal.spark_export.views.definition import ViewDefinition, ViewsFile, load_views

if TYPE_CHECKING:
    from shoal.spark_export.stream.running import BatchReport, Sink

_FILE = click.Path(path_type=Path)


@click.command("stream", short_help="Publish or push events as they come.")
@click.option("--views", "views_path", required=True, type=_FILE, help="The views.yaml with the streams to run.")
@click.option("--to", "root_address", metavar="ROOT", help="Publish deltas to this export root; created if missing.")
@click.option("--push-to", "url", metavar="URL", help="Push rows to the server at this address instead.")
@click.option("--checkpoint", required=True, metavar="DIR", help="The directory for Spark's checkpoint of each stream.")
@click.option("--view", "view_names", multiple=True, metavar="NAME", help="Stream only this view; may be repeated.")
@click.option(
    "--every",
    "every_seconds",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="The interval between starts of batches; 0: start a batch as soon as there are events.",
)
@click.option("--once", is_flag=True, help="Read the events that exist now, then end.")
@click.option(
    "--snapshot-every",
    type=click.IntRange(min=1),
    default=3600,
    show_default=True,
    metavar="DELTAS",
    help="After this many deltas publish a snapshot, and remove entries older than the previous snapshot.",
)
@click.option("--take-over", is_flag=True, help="Continue a log that an export or another stream wrote.")
@WRITE_FORMAT
@MASTER
@PACKAGES
@access_options
@click.option("--json", "as_json", is_flag=True, help="Print each batch as a line of JSON.")
def stream_command(
    views_path: Path,
    root_address: str | None,
    url: str | None,
    checkpoint: str,
    view_names: tuple[str, ...],
    every_seconds: float,
    once: bool,
    snapshot_every: int,
    take_over: bool,
    write_format: FormatVersion,
    master: str | None,
    packages: tuple[str, ...],
    token_file: Path | None,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
    as_json: bool,
) -> None:
    """Publish or push events as they come, until SIGTERM.

    Spark reads the views' streams, one batch of events after the other. Each batch becomes one delta in an export root,
    or is pushed to a server. The events of a batch are written exactly once, even if the stream is killed and started
    again with the same checkpoint.

    If started by spark-submit, the streams run in the session of spark-submit.
    """
    if (root_address is None) == (url is None):
        raise click.UsageError("give one of --to and --push-to")
    if take_over and root_address is None:
        raise click.UsageError("--take-over needs an export root with a log; leave it out, or give --to")
    views_file = load_views(views_path)
    views = _streaming(views_file, view_names)
    access = server_access(token_file, tls_ca, tls_certificate, tls_key)
    root = ExportRoot(root_address, write_format=write_format) if root_address is not None else None
    if root is not None:
        root.check_may_be_root()

    from shoal.spark_export.source.session import spark_session

    spark = spark_session(master, packages)

    from shoal.spark_export.stream.running import Streams

    stopped = threading.Event()
    stopped_by = set[int]()

    def stop(number: int, _frame: object) -> None:
        stopped_by.add(number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if root is not None:
        _prepare(root, views_file)
        from shoal.spark_export.stream.log import StreamLog

        log = partial(StreamLog, root=root, spark=spark, snapshot_every=snapshot_every, take_over=take_over)
        sinks: list[tuple[ViewDefinition, Sink]] = [(view, log(view)) for view in views]
    else:
        sinks = _pushes(views, url or "", access, stopped)
    location = checkpoint if ":" in checkpoint else f"file://{Path(checkpoint).absolute()}"
    streams = Streams(spark, location, partial(_print, as_json=as_json))
    for view in views:
        often = "until all events are read" if once else f"a batch every {every_seconds:g} s"
        say(f"{view.name}: reading {view.stream} into {root or url}, {often}", err=True)
    try:
        streams.run(sinks, every_seconds=every_seconds, once=once, stopped=stopped)
    finally:
        spark.stop()
    say("ended: all events are read" if once and not stopped_by else "ended by a signal", err=True)


def _streaming(views_file: ViewsFile, names: tuple[str, ...]) -> list[ViewDefinition]:
    """Return the views to stream: those with the given names, or all views with a stream if no name is given.

    Raises:
        DefinitionError: a named view is not defined or has no stream, or no view has a stream.
    """
    defined = {view.name: view for view in views_file.views}
    streaming = [view for view in views_file.views if view.stream is not None]
    listed = ", ".join(view.name for view in streaming) or "none"
    for name in names:
        if name not in defined or defined[name].stream is None:
            raise DefinitionError(f"no view {name!r} with a stream is defined; the views with a stream are: {listed}")
    if not streaming:
        raise DefinitionError("no view has a stream; give one to a view in views.yaml")
    return [view for view in streaming if not names or view.name in names]


def _prepare(root: ExportRoot, views_file: ViewsFile) -> None:
    from shoal.spark_export.exporter import publish_services
    from shoal.spark_export.publication.staging import write_errors_named

    with write_errors_named(root):
        publish_services(views_file, root)


def _pushes(
    views: list[ViewDefinition], url: str, access: ServerAccess, stopped: threading.Event
) -> "list[tuple[ViewDefinition, Sink]]":
    from shoal.spark_export.stream.pushing import StreamPushes

    def tell(sentence: str) -> None:
        say(sentence, err=True)

    return [(view, StreamPushes(view, url, access, tell, stopped.is_set)) for view in views]


def _print(report: "BatchReport", *, as_json: bool) -> None:
    if as_json:
        say_json(asdict(report), indent=None)
    else:
        say(
            f"{report.view}: batch {report.batch}: {report.rows:,} rows, the newest {report.newest_seconds_ago:.1f} s "
            f"old; {report.seconds:.1f} s"
        )
