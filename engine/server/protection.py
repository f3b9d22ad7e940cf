"""Access control of the server: tokens and TLS, if the settings have them."""

import logging
import ssl
from functools import partial

from shoal.engine.server.kept_files import ReloadableFiles
from shoal.engine.server.settings import ServerSettings
from shoal.engine.server.tls import Tls, read_tls, tls_files
from shoal.engine.server.tokens import Role, Tokens, read_tokens, warn_of_readers

log = logging.getLogger("shoal.supervisor")


class Auth:
    """The tokens and the TLS configuration of the server. The supervisor creates this object once, and each worker gets
    a copy at its fork. So a new worker starts with the last valid files, and then refreshes its own copy.

    Raises:
        SettingsInvalid: the tokens, the certificate or the key are invalid.
    """

    def __init__(self, settings: ServerSettings) -> None:
        self._tokens: ReloadableFiles[Tokens] | None = None
        self._tls: ReloadableFiles[Tls] | None = None
        if settings.asks_for_tokens:
            token_files = [settings.tokens] if settings.tokens is not None else []
            self._tokens = ReloadableFiles(token_files, partial(read_tokens, settings))
        if files := tls_files(settings):
            self._tls = ReloadableFiles(files, partial(read_tls, settings))

    @property
    def asks_for_tokens(self) -> bool:
        """Whether a request needs a token; if not, `authorize` accepts all requests."""
        return self._tokens is not None

    def authorize(self, authorization: str | None, role: Role) -> str | None:
        """Return the name of the token in an Authorization header; None if the server has no tokens.

        Raises:
            TokenInvalid, RoleMissing: the request must be refused.
        """
        return self._tokens.value.check(authorization, role) if self._tokens is not None else None

    @property
    def tls(self) -> Tls | None:
        """The TLS configuration for new connections; None for plain TCP."""
        return self._tls.value if self._tls is not None else None

    def context(self) -> ssl.SSLContext | None:
        """Return the TLS context for new HTTP connections; None for plain TCP."""
        return self._tls.value.context if self._tls is not None else None

    def refresh(self) -> None:
        """Read changed files again. Call this about every second."""
        for kept in (self._tokens, self._tls):
            if kept is not None:
                kept.refresh()


def warn_of_gaps(settings: ServerSettings) -> None:
    """Log a warning about settings that may give others more access than intended."""
    if settings.tokens is not None:
        warn_of_readers(settings.tokens)
    if settings.reaches_beyond and settings.tls_certificate is None:
        if settings.asks_for_tokens:
            log.warning(
                "tokens and features cross the network unencrypted: set tls_certificate and tls_key, or put a proxy "
                "with TLS in front"
            )
        else:
            log.warning("any client that can reach %s can read, write and reload: open_to_all is set", settings.host)
