"""The bearer tokens of clients, and the roles that they grant.

    # roles      token, or its SHA-256 in hex    a name for the log
    read         vJ0mZ1…                         ranker
    read,push    sha256:5e884898da28…            stream
    admin        sha256:9b74c9897bac…            ops

`admin` may do everything. `push` may write but not read: a job that writes features need not read other features.
"""

import logging
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from pathlib import Path
from typing import Literal, cast, get_args

from shoal.engine.base.errors import RoleMissing, SettingsInvalid, TokenInvalid
from shoal.engine.server.settings import ServerSettings

log = logging.getLogger("shoal.supervisor")

Role = Literal["read", "push", "admin"]
"""The role that a request may need: to read features, to write them, or to administer the server."""

ROLES: tuple[Role, ...] = get_args(Role)
TOKENS_VARIABLE = "SHOAL_TOKENS"
_LEAST_CHARACTERS = 16
"""The minimum length of a token. Its SHA-256 has no salt, so a short token could be guessed from it."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""The syntax of tokens in RFC 6750, so that every client can send them."""
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_MEND = "write lines of ROLES TOKEN [NAME], see docs/security.md"


@dataclass(frozen=True)
class _Token:
    """A known token. Only its digest is stored."""

    digest: bytes
    roles: frozenset[Role]
    name: str


class Tokens:
    """The set of known tokens."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens

    def check(self, authorization: str | None, role: Role) -> str:
        """Return the name of the token in an Authorization header, if the token has the role.

        Raises:
            TokenInvalid: the request has no bearer token, or the token is not known.
            RoleMissing: the token does not have the role.
        """
        if authorization is None:
            raise TokenInvalid("the request needs a token, and has none; send it as Authorization: Bearer TOKEN")
        scheme, _, sent = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise TokenInvalid("the Authorization header is not a bearer token; send Bearer TOKEN")
        digest = sha256(sent.strip().encode(errors="surrogateescape")).digest()
        found = None
        # Compare all tokens, even after a match: otherwise the time of the comparison would reveal the position of the
        # token.
        for token in self._tokens:
            if compare_digest(token.digest, digest):
                found = token
        if found is None:
            raise TokenInvalid("the token is not one of this server's; it may have been replaced")
        if role not in found.roles:
            held = " and ".join(each for each in ROLES if each in found.roles)
            raise RoleMissing(f"the token {found.name!r} may {held}; the request needs one that may {role}")
        return found.name


def read_tokens(settings: ServerSettings) -> Tokens:
    """Return the tokens of the file in the settings, or else of the environment variable.

    Raises:
        SettingsInvalid: the file cannot be read, or a line is invalid; no message repeats a token.
    """
    if settings.tokens is None:
        return parse_tokens(settings.tokens_text.get_secret_value() if settings.tokens_text else "", TOKENS_VARIABLE)
    try:
        text = settings.tokens.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"tokens is {str(settings.tokens)!r}, which cannot be read: {error}") from None
    return parse_tokens(text, str(settings.tokens))


def parse_tokens(text: str, origin: str) -> Tokens:
    """Return the tokens in a text; `origin` names the text in errors.

    Raises:
        SettingsInvalid: a line is invalid, or the text has no token.
    """
    tokens: dict[bytes, _Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        token = _parsed(fields, f"{origin}, line {number}")
        if token.digest in tokens:
            raise SettingsInvalid(f"{origin}, line {number}: the token appears twice; give it one line: read,push")
        tokens[token.digest] = token
    if not tokens:
        raise SettingsInvalid(f"{origin} holds no token; {_MEND}")
    return Tokens([*tokens.values()])


def _parsed(fields: Sequence[str], place: str) -> _Token:
    if len(fields) not in (2, 3):
        raise SettingsInvalid(f"{place} has {len(fields)} fields; {_MEND}")
    roles = fields[0].split(",")
    for role in roles:
        if role not in ROLES:
            # Do not repeat the role in the message: it may be a token in the wrong place.
            raise SettingsInvalid(f"{place} does not begin with a role; the roles are {', '.join(ROLES)}; {_MEND}")
    name = fields[2] if len(fields) == 3 else place.rpartition(", ")[2]
    granted = ROLES if "admin" in roles else cast(list[Role], roles)
    return _Token(_digest(fields[1], place), frozenset(granted), name)


def _digest(token: str, place: str) -> bytes:
    if token.startswith("sha256:"):
        match = _DIGEST.fullmatch(token)
        if match is None:
            raise SettingsInvalid(f"{place}: after sha256: there must be 64 hex digits, as sha256sum prints them")
        return bytes.fromhex(match[1])
    if len(token) < _LEAST_CHARACTERS:
        raise SettingsInvalid(
            f"{place}: the token has {len(token)} characters, but needs at least {_LEAST_CHARACTERS}; make one with "
            f"`openssl rand -hex 32`"
        )
    if not _TOKEN.fullmatch(token):
        raise SettingsInvalid(f"{place}: a token may have only letters, digits and -._~+/, with = at the end")
    return sha256(token.encode()).digest()


def warn_of_readers(path: Path) -> None:
    """Log a warning if any user of the machine can read the tokens in a file.

    This is not an error: by default Kubernetes mounts secrets with such a mode, in a container without other users.
    """
    if path.stat().st_mode & stat.S_IROTH and any(
        fields[1:] and not fields[0].startswith("#") and not fields[1].startswith("sha256:")
        for fields in map(str.split, path.read_text().splitlines())
    ):
        log.warning("every user of this machine can read the tokens in %s; chmod o-r it, or keep their SHA-256", path)
