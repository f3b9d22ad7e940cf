"""Who may ask the server for what: bearer tokens and their roles.

    # roles      token, or its SHA-256 in hex    a name for the log
    read         vJ0mZ1…                         ranker
    read,push    sha256:5e884898da28…            stream
    admin        sha256:9b74c9897bac…            ops

`admin` may do everything. `push` may write and not read: a job that delivers features has no use for those of others.
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

from engine.errors import RoleMissing, SettingsInvalid, TokenInvalid
from engine.settings import ServerSettings

log = logging.getLogger("shoal.supervisor")

Role = Literal["read", "push", "admin"]
"""What a request may need: to read features, to write them, or to tell the server what to do."""

ROLES: tuple[Role, ...] = get_args(Role)
TOKENS_VARIABLE = "SHOAL_TOKENS"
_LEAST_CHARACTERS = 16
"""Of a token. Its SHA-256 has no salt, and a short one could be found by trying."""
_TOKEN = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""As RFC 6750 has it, so that every client can send it."""
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_MEND = "write lines of ROLES TOKEN [NAME], see docs/security.md"


@dataclass(frozen=True)
class _Token:
    """A token that is known, by its digest alone."""

    digest: bytes
    roles: frozenset[Role]
    name: str


class Tokens:
    """The tokens that are known."""

    def __init__(self, tokens: Sequence[_Token]) -> None:
        self._tokens = tokens

    def check(self, authorization: str | None, role: Role) -> str:
        """The name of whoever sends an Authorization header, if its token has a role.

        Raises:
            TokenInvalid: there is none, or nobody knows it.
            RoleMissing: the token has not the role.
        """
        if authorization is None:
            raise TokenInvalid("this needs a token, and none came; send it as Authorization: Bearer TOKEN")
        scheme, _, sent = authorization.partition(" ")
        if scheme.lower() != "bearer":
            raise TokenInvalid("the Authorization is not a bearer token; send Bearer TOKEN")
        digest = sha256(sent.strip().encode(errors="surrogateescape")).digest()
        found = None
        # All of them, however early one fits: how long it takes tells nothing.
        for token in self._tokens:
            if compare_digest(token.digest, digest):
                found = token
        if found is None:
            raise TokenInvalid("the token is not one of this server's; it may have been replaced")
        if role not in found.roles:
            held = " and ".join(each for each in ROLES if each in found.roles)
            raise RoleMissing(f"the token {found.name!r} may {held}; this needs one that may {role}")
        return found.name


def read_tokens(settings: ServerSettings) -> Tokens:
    """The tokens that the settings name: those of the file, or else of the environment.

    Raises:
        SettingsInvalid: the file cannot be read, or a line of it is wrong; no message repeats a token.
    """
    if settings.tokens is None:
        return parse_tokens(settings.tokens_text.get_secret_value() if settings.tokens_text else "", TOKENS_VARIABLE)
    try:
        text = settings.tokens.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsInvalid(f"tokens is {str(settings.tokens)!r}, which cannot be read: {error}") from None
    return parse_tokens(text, str(settings.tokens))


def parse_tokens(text: str, origin: str) -> Tokens:
    """The tokens in a text; `origin` names it in errors.

    Raises:
        SettingsInvalid: a line is wrong, or there is no token.
    """
    tokens: dict[bytes, _Token] = {}
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields or fields[0].startswith("#"):
            continue
        token = _parsed(fields, f"{origin}, line {number}")
        if token.digest in tokens:
            raise SettingsInvalid(f"{origin}, line {number}: the token stands there twice; give it one line: read,push")
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
            # It may be a token that stands in the wrong place.
            raise SettingsInvalid(f"{place} begins with no role; the roles are {', '.join(ROLES)}; {_MEND}")
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
            f"{place}: the token has {len(token)} characters, and {_LEAST_CHARACTERS} are the least; make one by "
            f"`openssl rand -hex 32`"
        )
    if not _TOKEN.fullmatch(token):
        raise SettingsInvalid(f"{place}: a token is of letters, digits and -._~+/ and may end in =")
    return sha256(token.encode()).digest()


def warn_of_readers(path: Path) -> None:
    """Log it if any user of the machine can read tokens.

    That is no reason to refuse them: a secret that Kubernetes mounts is so unless it is told otherwise, in a container
    where nobody else is.
    """
    if path.stat().st_mode & stat.S_IROTH and any(
        fields[1:] and not fields[0].startswith("#") and not fields[1].startswith("sha256:")
        for fields in map(str.split, path.read_text().splitlines())
    ):
        log.warning("every user of this machine can read the tokens in %s; chmod o-r it, or keep their SHA-256", path)
