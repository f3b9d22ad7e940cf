"""The command `shoal`: each subcommand is defined where its work is done, and gathered here."""

import os
import sys

import click

from engine.commands import lookup_command, status_command
from engine.errors import ShoalError
from loaders.commands import load_command, reload_command, verify_command
from spark_export.command import export_command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="shoal")
def shoal() -> None:
    """Online feature store serving engine: many worker processes, one shared memory-mapped store."""


for command in (export_command, load_command, lookup_command, reload_command, status_command, verify_command):
    shoal.add_command(command)


def main() -> None:
    """Run the command line; an error that Shoal foresaw is one line on stderr and its exit code."""
    try:
        shoal()
    except ShoalError as error:
        click.echo(f"shoal: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read the output has had enough; Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
