"""The command `shoal`: each subcommand is defined in the package that does its work, and is registered here."""

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import cast

import click

from shoal.engine.base.errors import OutputUnwritable, ShoalError
from shoal.engine.base.shards import Shard
from shoal.engine.base.system import check_can_serve
from shoal.engine.cli.feast_commands import feast_diff_command
from shoal.engine.cli.lookup_command import lookup_command
from shoal.engine.cli.status_command import STORE, status_command
from shoal.engine.cli.terminal import say
from shoal.engine.root.export_root import ExportRoot
from shoal.engine.server.settings import ServerSettings, server_settings
from shoal.loaders.cli.drop_command import drop_view_command
from shoal.loaders.cli.load_commands import SHARD, load_command, reload_command, verify_command
from shoal.loaders.cli.store_commands import backup_command, restore_command, store_command
from shoal.loaders.dynamodb.command import sync_dynamodb_command
from shoal.spark_export.cli.export_command import export_command, feast_views_command
from shoal.spark_export.cli.stream_command import stream_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="shoal", prog_name="shoal")
def shoal() -> None:
    """Online feature store serving engine: many worker processes, one shared memory-mapped store."""


def _help(setting: str) -> str:
    """Return a setting's description as the help text of its option, so that the text is written only once."""
    text = f"{ServerSettings.model_fields[setting].description}."
    return text[0].upper() + text[1:]


@click.command("serve", short_help="Serve a store over HTTP, and apply new publications.")
@STORE
@click.option(
    "--from", "address", metavar="ROOT", help="The export root to follow: a directory, or s3://BUCKET/PREFIX."
)
@click.option(
    "--poll", default=5.0, show_default=True, metavar="SECONDS", help="How often to check the root besides file events."
)
@SHARD
@click.option("--host", help=_help("host"))
@click.option("--port", type=int, help=_help("port"))
@click.option("--grpc-port", type=int, help=_help("grpc_port"))
@click.option("--unix", "unix_socket", type=click.Path(path_type=Path), help=_help("unix_socket"))
@click.option("--workers", type=int, help=_help("workers"))
@click.option("--replace", is_flag=True, default=None, help=_help("replace"))
@click.option("--drain-seconds", type=float, help=_help("drain_seconds"))
@click.option("--ready-lag-seconds", type=float, help=_help("ready_lag_seconds"))
@click.option("--ready-unseen-seconds", type=float, help=_help("ready_unseen_seconds"))
@click.option("--scrub-hours", type=float, help=_help("scrub_hours"))
@click.option("--silent-seconds", type=float, help=_help("silent_seconds"))
@click.option("--max-body-bytes", type=int, help=_help("max_body_bytes"))
@click.option("--max-keys", type=int, help=_help("max_keys"))
@click.option("--request-timeout-ms", type=int, help=_help("request_timeout_ms"))
@click.option("--max-connections", type=int, help=_help("max_connections"))
@click.option("--patience-seconds", type=float, help=_help("patience_seconds"))
@click.option("--idle-seconds", type=float, help=_help("idle_seconds"))
@click.option("--max-values", type=int, help=_help("max_values"))
@click.option("--max-answer-bytes", type=int, help=_help("max_answer_bytes"))
@click.option("--max-unsent-bytes", type=int, help=_help("max_unsent_bytes"))
@click.option("--remote-timeout-ms", type=int, help=_help("remote_timeout_ms"))
@click.option("--remote-hedge-ms", type=int, help=_help("remote_hedge_ms"))
@click.option("--remote-cache-seconds", type=float, help=_help("remote_cache_seconds"))
@click.option("--remote-cache-mib", type=int, help=_help("remote_cache_mib"))
@click.option("--feast-strict", is_flag=True, default=None, help=_help("feast_strict"))
@click.option("--access-log", is_flag=True, default=None, help=_help("access_log"))
@click.option("--tokens", type=click.Path(path_type=Path), metavar="FILE", help=_help("tokens"))
@click.option("--protect-metrics", is_flag=True, default=None, help=_help("protect_metrics"))
@click.option("--tls-certificate", type=click.Path(path_type=Path), metavar="FILE", help=_help("tls_certificate"))
@click.option("--tls-key", type=click.Path(path_type=Path), metavar="FILE", help=_help("tls_key"))
@click.option("--tls-client-ca", type=click.Path(path_type=Path), metavar="FILE", help=_help("tls_client_ca"))
@click.option("--open-to-all", is_flag=True, default=None, help=_help("open_to_all"))
def serve_command(store: Path, address: str | None, poll: float, shard: Shard | None, **options: object) -> None:
    """Serve a store from many worker processes over one memory map.

    One writer process follows the export root: with file events, and with a check every few seconds. The store need not
    exist yet. SIGTERM drains the server. SIGHUP checks the export root at once. A child that dies is replaced.
    """
    check_can_serve()
    given = {name: value for name, value in options.items() if value is not None}
    settings = server_settings(store=store, tokens_text=os.environ.get("SHOAL_TOKENS"), **given)

    from shoal.engine.server.run import run
    from shoal.loaders.warming import warm
    from shoal.loaders.writer import check_shard, run_writer

    root = ExportRoot(address) if address is not None else None
    if shard is not None:
        check_shard(store, shard)
    writer = partial(run_writer, store, root, poll_seconds=poll, scrub_hours=settings.scrub_hours, shard=shard)
    run(settings, writer, follows=root is not None, warm_writer=warm)


shoal.add_command(serve_command)
for command in (
    backup_command,
    drop_view_command,
    export_command,
    feast_diff_command,
    feast_views_command,
    load_command,
    lookup_command,
    reload_command,
    restore_command,
    status_command,
    store_command,
    stream_command,
    sync_dynamodb_command,
    verify_command,
):
    shoal.add_command(command)


def _open_streams() -> None:
    """Open /dev/null for each closed standard stream. Otherwise the next opened file, such as one of a store, would get
    the stream's descriptor. Writing to a closed stdout fails; log lines to a closed stderr are lost."""
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)


class _Output(io.TextIOWrapper):
    """The standard output of a command. A failed write raises OutputUnwritable, except for a broken pipe."""

    def write(self, text: str, /) -> int:
        with _failures_named():
            return super().write(text)

    def flush(self) -> None:
        with _failures_named():
            super().flush()


@contextmanager
def _failures_named() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputUnwritable(
            f"the command's output cannot be written: {error.strerror}; redirect it elsewhere"
        ) from error


def _drop_output() -> None:
    """Discard unprinted output: Python flushes at exit, and would report the same error again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def main() -> None:
    """Run the command line. For a ShoalError, print one line on stderr and exit with the error's code."""
    _open_streams()
    stdout = cast(io.TextIOWrapper, sys.stdout)
    encoding = stdout.encoding
    is_terminal = stdout.isatty()
    # Print characters that the terminal's encoding lacks as escapes, instead of raising an error.
    sys.stdout = _Output(stdout.detach(), encoding, "backslashreplace", line_buffering=is_terminal)
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr.reconfigure(errors="backslashreplace")
    try:
        try:
            status = shoal(prog_name="shoal", standalone_mode=False)
        finally:
            sys.stdout.flush()
        sys.exit(status)
    except click.ClickException as error:
        # The message may contain command-line arguments or text from a file.
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip("\n"), err=True)
        sys.exit(error.exit_code)
    except click.Abort:
        say("Aborted!", err=True)
        sys.exit(1)
    except ShoalError as error:
        if isinstance(error, OutputUnwritable):
            _drop_output()
        say(f"shoal: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _drop_output()  # The reader has closed the pipe.
        sys.exit(1)


if __name__ == "__main__":
    main()
