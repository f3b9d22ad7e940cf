"""What a client of a Shoal server shows, and what it trusts: for the commands that ask one over HTTP."""

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import Request

import click

from engine.errors import ServerFailed

TOKEN_VARIABLE = "SHOAL_TOKEN"  # nosec B105

_FILE = click.Path(path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--token-file", type=_FILE, metavar="FILE", help="Its token, which SHOAL_TOKEN may hold instead."),
    click.option(
        "--tls-ca", type=_FILE, metavar="FILE", help="Trust its certificate if one of these, as PEM, signed it."
    ),
    click.option("--tls-certificate", type=_FILE, metavar="FILE", help="A certificate to show it, as PEM."),
    click.option("--tls-key", type=_FILE, metavar="FILE", help="The key of that certificate, as PEM."),
)


def access_options(command: _Command) -> _Command:
    """The options of a command that asks a server: `token_file`, `tls_ca`, `tls_certificate` and `tls_key`, as
    `server_access` takes them."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class ServerAccess:
    """A token to send, and what to make TLS connections with, where that is not what the system has."""

    token: str | None = None
    tls: ssl.SSLContext | None = None

    def show(self, request: Request) -> None:
        """Put the token into a request, but not into another one that the answer may lead to."""
        if self.token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")


def server_access(
    token_file: Path | None = None, ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ServerAccess:
    """What the files hold; the token is that of the environment, SHOAL_TOKEN, where no file has it.

    A token is no argument, since every user of a machine can read the command lines of all.

    Raises:
        ServerFailed: a file cannot be read, or holds something else.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerFailed(f"the token in {token_file} cannot be read: {error}") from None
    if key is not None and certificate is None:
        raise ServerFailed(f"the key {key} has no certificate; give that too")
    if ca is None and certificate is None:
        return ServerAccess(token)
    context = ssl.create_default_context()
    for path, load in (
        (ca, context.load_verify_locations),
        (certificate, lambda path: context.load_cert_chain(path, key)),
    ):
        if path is not None:
            try:
                load(path)
            except OSError as error:  # Which ssl's own errors are.
                raise ServerFailed(
                    f"{path} cannot be used for TLS: {error}; give certificates and keys as PEM"
                ) from None
    return ServerAccess(token, context)
