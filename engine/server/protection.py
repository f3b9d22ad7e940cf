"""What stands between the server and those who may not ask it: tokens and TLS, as far as the settings have them."""

import logging
import ssl
from functools import partial

from engine.server.kept_files import KeptFiles
from engine.server.tls import Tls, read_tls, tls_files
from engine.server.tokens import Role, Tokens, read_tokens, warn_of_readers
from engine.settings import ServerSettings

log = logging.getLogger("shoal.supervisor")


class Protection:
    """Made once, by the supervisor; each worker has it as it stands at the fork, so that one which is replaced starts
    with the last that was valid, and goes on from there by itself.

    Raises:
        SettingsInvalid: the tokens, the certificate or the key are not what they should be.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._tokens: KeptFiles[Tokens] | None = None
        self._tls: KeptFiles[Tls] | None = None
        if settings.asks_for_tokens:
            token_files = [settings.tokens] if settings.tokens is not None else []
            self._tokens = KeptFiles(token_files, partial(read_tokens, settings))
        if files := tls_files(settings):
            self._tls = KeptFiles(files, partial(read_tls, settings))

    @property
    def asks_for_tokens(self) -> bool:
        """Whether a request needs a token: if not, `authorize` lets all through."""
        return self._tokens is not None

    def authorize(self, authorization: str | None, role: Role) -> str | None:
        """The name of whoever sends an Authorization header; None if no tokens are asked for.

        Raises:
            TokenInvalid, RoleMissing: the request is to be refused.
        """
        return self._tokens.value.check(authorization, role) if self._tokens is not None else None

    @property
    def tls(self) -> Tls | None:
        """What new connections are to be made with."""
        return self._tls.value if self._tls is not None else None

    def context(self) -> ssl.SSLContext | None:
        """The same for HTTP."""
        return self._tls.value.context if self._tls is not None else None

    def refresh(self) -> None:
        """Take over files that have changed; to be called every second or so."""
        for kept in (self._tokens, self._tls):
            if kept is not None:
                kept.refresh()


def warn_of_gaps(settings: ServerSettings) -> None:
    """Log what a server lets others do that its owner may not have meant."""
    if settings.tokens is not None:
        warn_of_readers(settings.tokens)
    if settings.reaches_beyond and settings.tls_certificate is None:
        if settings.asks_for_tokens:
            log.warning(
                "tokens and features go over the network as they are: set tls_certificate and tls_key, or have a proxy "
                "in front that does TLS"
            )
        else:
            log.warning("whoever reaches %s can read, write and reload: open_to_all is set", settings.host)
