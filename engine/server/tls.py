"""The server's certificate, and whose certificates it takes, for HTTP and gRPC alike."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from engine.errors import SettingsInvalid
from engine.settings import ServerSettings


@dataclass(frozen=True)
class Tls:
    """What the files of the settings hold: ready for HTTP, and as it is, PEM, for gRPC, which has a TLS of its own."""

    context: ssl.SSLContext
    certificate: bytes
    key: bytes
    client_ca: bytes | None


def tls_files(settings: ServerSettings) -> list[Path]:
    """The files that make up the server's TLS; none if it has none."""
    files = (settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return [path for path in files if path is not None]


def read_tls(settings: ServerSettings) -> Tls:
    """What the settings' files hold.

    TLS 1.2 is the oldest that is spoken, and of its ciphers only those with forward secrecy: the defaults of Python, as
    of gRPC. With a `tls_client_ca`, nobody gets as far as a request without a certificate that one of it signed.

    Raises:
        SettingsInvalid: a file cannot be read, or holds something else, or the key is of another certificate.
    """
    if settings.tls_certificate is None or settings.tls_key is None:
        raise SettingsInvalid("tls_certificate and tls_key are not set; give both")
    certificate = _read("tls_certificate", settings.tls_certificate)
    key = _read("tls_key", settings.tls_key)
    client_ca = _read("tls_client_ca", settings.tls_client_ca) if settings.tls_client_ca is not None else None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _check_certificates("tls_certificate", settings.tls_certificate)
    try:
        context.load_cert_chain(settings.tls_certificate, settings.tls_key, password=_refuse_passphrase)
    except ssl.SSLError as error:
        what = "is the key of another certificate" if "MISMATCH" in (error.reason or "") else "holds no private key"
        raise SettingsInvalid(
            f"tls_key is {str(settings.tls_key)!r}, which {what}; give the one of {settings.tls_certificate}, as PEM "
            f"and without a passphrase"
        ) from None
    except OSError as error:
        raise SettingsInvalid(f"tls_key is {str(settings.tls_key)!r}, which cannot be read: {error}") from None
    if settings.tls_client_ca is not None:
        _check_certificates("tls_client_ca", settings.tls_client_ca)
        context.load_verify_locations(settings.tls_client_ca)
        context.verify_mode = ssl.CERT_REQUIRED
    return Tls(context, certificate, key, client_ca)


def _read(name: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsInvalid(f"{name} is {str(path)!r}, which cannot be read: {error}") from None


def _check_certificates(name: str, path: Path) -> None:
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # Which ssl's own errors are.
        raise SettingsInvalid(f"{name} is {str(path)!r}, which holds no certificate as PEM: {error}") from None


def _refuse_passphrase() -> str:
    """Otherwise OpenSSL would ask for one at the terminal; with this one it says that the key cannot be read."""
    return ""
