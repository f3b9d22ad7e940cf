"""The credentials and the trusted certificates of commands that send requests to a Shoal server over HTTP."""

import os
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.request import Request

import click

from shoal.engine.base.errors import ServerFailed

TOKEN_VARIABLE = "SHOAL_TOKEN"  # nosec B105

_FILE = click.Path(path_type=Path)
_Command = TypeVar("_Command", bound=Callable[..., Any])
_OPTIONS = (
    click.option("--token-file", type=_FILE, metavar="FILE", help="The server's token; the default is SHOAL_TOKEN."),
    click.option("--tls-ca", type=_FILE, metavar="FILE", help="The PEM file of the CAs to trust for the server."),
    click.option("--tls-certificate", type=_FILE, metavar="FILE", help="The client's certificate, as PEM."),
    click.option("--tls-key", type=_FILE, metavar="FILE", help="The key of --tls-certificate, as PEM."),
)


def access_options(command: _Command) -> _Command:
    """Add the options of a command that sends requests to a server: `token_file`, `tls_ca`, `tls_certificate` and
    `tls_key`, the arguments of `server_access`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class ServerAccess:
    """The token to send, and the TLS context. `tls` is None if the system's default is used."""

    token: str | None = None
    tls: ssl.SSLContext | None = None

    def show(self, request: Request) -> None:
        """Add the token to a request, but not to the request that follows a redirect."""
        if self.token is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self.token}")


def server_access(
    token_file: Path | None = None, ca: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ServerAccess:
    """Read the token, the certificates and the key from files. Without a token file, the token is the value of
    SHOAL_TOKEN.

    The token itself cannot be an argument, because every user of a machine can read all command lines.

    Raises:
        ServerFailed: a file cannot be read or has the wrong content, or a key is given without a certificate.
    """
    token = os.environ.get(TOKEN_VARIABLE)
    if token_file is not None:
        try:
            token = token_file.read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ServerFailed(f"the token in {token_file} cannot be read: {error}") from None
    if key is not None and certificate is None:
        raise ServerFailed(f"the key {key} has no certificate; give --tls-certificate too")
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
            except OSError as error:  # The errors of `ssl` are OSErrors too.
                raise ServerFailed(
                    f"{path} cannot be used for TLS: {error}; give certificates and keys as PEM"
                ) from None
    return ServerAccess(token, context)
