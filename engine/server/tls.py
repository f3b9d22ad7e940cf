"""The server's TLS certificate, and the CAs of client certificates, for both HTTP and gRPC."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from shoal.engine.base.errors import SettingsInvalid
from shoal.engine.server.settings import ServerSettings


@dataclass(frozen=True)
class Tls:
    """The content of the TLS files: a context for HTTP, and the raw PEM for gRPC's own TLS implementation."""

    context: ssl.SSLContext
    certificate: bytes
    key: bytes
    client_ca: bytes | None


def tls_files(settings: ServerSettings) -> list[Path]:
    """Return the paths of the TLS files in the settings; an empty list without TLS."""
    files = (settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    return [path for path in files if path is not None]


def read_tls(settings: ServerSettings) -> Tls:
    """Return the checked content of the TLS files in the settings.

    The oldest accepted version is TLS 1.2, with only the ciphers that have forward secrecy. These are the defaults of
    Python and of gRPC. With a `tls_client_ca`, only clients with a certificate signed by one of its CAs can send
    requests.

    Raises:
        SettingsInvalid: a file cannot be read or has invalid content, or the key belongs to another certificate.
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
            f"tls_key is {str(settings.tls_key)!r}, which {what}; give the key of {settings.tls_certificate}, as PEM "
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
    except OSError as error:  # Includes ssl.SSLError.
        raise SettingsInvalid(f"{name} is {str(path)!r}, which holds no certificate as PEM: {error}") from None


def _refuse_passphrase() -> str:
    """Return an empty passphrase. Without this function, OpenSSL would ask for a passphrase on the terminal instead of
    failing."""
    return ""
