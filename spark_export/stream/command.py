"""The command `shoal stream`."""

import signal
import threading
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from engine.errors import DefinitionError
from engine.export_root import ExportRoot
from engine.manifest import FormatVersion
from engine.server_access import ServerAccess, access_options, server_access
from engine.terminal import say, say_json
from spark_export.command import MASTER, PACKAGES, WRITE_FORMAT
from spark_export.views import ViewDefinition, ViewsFile, load_views

if TYPE_CHECKING:
    from spark_export.stream.running import BatchReport, Sink

_FILE = click.Path(path_type=Path)


@click.command("stream", short_help="Publish or push events as they come.")
@click.option("--views", "views_path", required=True, type=_FILE, help="The views.yaml whose streams are to run.")
@click.option("--to", "root_address", metavar="ROOT", help="Publish deltas to this export root; made if new.")
@click.option("--push-to", "url", metavar="URL", help="Push rows to the server at this address instead.")
@click.option("--checkpoint", required=True, metavar="DIR", help="Where Spark keeps how far each stream has come.")
@click.option("--view", "view_names", multiple=True, metavar="NAME", help="Only this view; may be given again.")
@click.option(
    "--every",
    "every_seconds",
    type=click.FloatRange(min=0),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often a batch begins; 0: as soon as there are events.",
)
@click.option("--once", is_flag=True, help="End when all that is there now has been read.")
@click.option(
    "--snapshot-every",
    type=click.IntRange(min=1),
    default=3600,
    show_default=True,
    metavar="DELTAS",
    help="Behind so many deltas publish a snapshot, and remove entries older than the one before it.",
)
@click.option("--take-over", is_flag=True, help="Go on with a log that an export, or another stream, wrote.")
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

    The views' streams are read by Spark, a batch of events after the other. Each batch becomes one delta in an export
    root, or is pushed to a server. What a batch holds is written once, also if the stream is killed and started again
    with the same checkpoint.

    Started by spark-submit, the streams run in the session that it sets up.
    """
    if (root_address is None) == (url is None):
        raise click.UsageError("give one of --to and --push-to")
    if take_over and root_address is None:
        raise click.UsageError("--take-over is about the log of an export root; leave it out, or give --to")
    views_file = load_views(views_path)
    views = _streaming(views_file, view_names)
    access = server_access(token_file, tls_ca, tls_certificate, tls_key)
    root = ExportRoot(root_address, write_format=write_format) if root_address is not None else None
    if root is not None:
        root.check_may_be_root()

    from spark_export.session import spark_session

    spark = spark_session(master, packages)

    from spark_export.stream.running import Streams

    stopped, stopped_by = threading.Event(), set[int]()

    def stop(number: int, _frame: object) -> None:
        stopped_by.add(number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    if root is not None:
        _prepare(root, views_file)
        from spark_export.stream.log import StreamLog

        log = partial(StreamLog, root=root, spark=spark, snapshot_every=snapshot_every, take_over=take_over)
        sinks: list[tuple[ViewDefinition, Sink]] = [(view, log(view)) for view in views]
    else:
        sinks = _pushes(views, url or "", access, stopped)
    location = checkpoint if ":" in checkpoint else f"file://{Path(checkpoint).absolute()}"
    streams = Streams(spark, location, partial(_print, as_json=as_json))
    for view in views:
        often = "until all is read" if once else f"a batch every {every_seconds:g} s"
        say(f"{view.name}: reading {view.stream} into {root or url}, {often}", err=True)
    try:
        streams.run(sinks, every_seconds=every_seconds, once=once, stopped=stopped)
    finally:
        spark.stop()
    say("ended: all is read" if once and not stopped_by else "ended by a signal", err=True)


def _streaming(views_file: ViewsFile, names: tuple[str, ...]) -> list[ViewDefinition]:
    """The views to run; raises DefinitionError where one that is named has no stream, or none has."""
    defined = {view.name: view for view in views_file.views}
    streaming = [view for view in views_file.views if view.stream is not None]
    listed = ", ".join(view.name for view in streaming) or "none"
    for name in names:
        if name not in defined or defined[name].stream is None:
            raise DefinitionError(f"no view {name!r} with a stream is defined; there are {listed}")
    if not streaming:
        raise DefinitionError("no view has a stream; give one to a view in views.yaml")
    return [view for view in streaming if not names or view.name in names]


def _prepare(root: ExportRoot, views_file: ViewsFile) -> None:
    from spark_export.exporter import publish_services
    from spark_export.publication import writing

    with writing(root):
        publish_services(views_file, root)


def _pushes(
    views: list[ViewDefinition], url: str, access: ServerAccess, stopped: threading.Event
) -> "list[tuple[ViewDefinition, Sink]]":
    from spark_export.stream.pushing import StreamPushes

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
