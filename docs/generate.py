"""Write docs/cli.md from the commands themselves: `python docs/generate.py`."""

from collections.abc import Iterator
from pathlib import Path

import click

from shoal.cli import shoal

CLI_PAGE = Path(__file__).with_name("cli.md")

_HEAD = """# The command line

Written by `python docs/generate.py` from the commands themselves. What they find goes to stdout, with `--json` as one
JSON document; progress and errors go to stderr.

| exit code | means |
|---:|---|
| 0 | done |
| 1 | it failed, or what was checked is bad: one line on stderr says what and how to mend it |
| 2 | the command line, a definition or a request is wrong |
| 3 | `export`, `stream`: another published first; run it again |
"""


def cli_page() -> str:
    """The whole page."""
    parts = [_HEAD]
    for name, command in _commands(shoal):
        context = click.Context(command, info_name=f"shoal {name}", terminal_width=100, **shoal.context_settings)
        parts.append(f"## shoal {name}\n\n```text\n{command.get_help(context)}\n```\n")
    return "\n".join(parts)


def _commands(group: click.Group, prefix: str = "") -> Iterator[tuple[str, click.Command]]:
    """All commands of a group, and of groups in it, by name."""
    for name, command in sorted(group.commands.items()):
        if isinstance(command, click.Group):
            yield from _commands(command, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", command


if __name__ == "__main__":
    CLI_PAGE.write_text(cli_page())
