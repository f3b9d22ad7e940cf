"""Certificates for tests, made by openssl as a private certificate authority would make them."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Certificate:
    certificate: Path
    key: Path


def openssl(*arguments: object) -> None:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Authority:
    """A certificate authority for 127.0.0.1. A certificate that is signed again keeps its file paths."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir()
        self._directory = directory
        self.certificate = directory / "ca.pem"
        self._key = directory / "ca.key"
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        subject = ("-subj", f"/CN={directory.name}")
        out = ("-keyout", self._key, "-out", self.certificate)
        openssl("req", "-x509", *curve, "-nodes", *subject, "-days", 1, *out)

    def sign(self, name: str) -> Certificate:
        key, request, certificate = (self._directory / f"{name}.{kind}" for kind in ("key", "csr", "pem"))
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1")
        names = ("-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1")
        openssl("req", *curve, "-nodes", *names, "-keyout", key, "-out", request)
        signer = ("-CA", self.certificate, "-CAkey", self._key, "-CAcreateserial")
        openssl("x509", "-req", "-in", request, *signer, "-days", 1, "-copy_extensions", "copy", "-out", certificate)
        return Certificate(certificate, key)

    def client(self, own: Certificate | None = None) -> ssl.SSLContext:
        """Return the TLS settings of a client that trusts this authority, optionally with a client certificate of its
        own."""
        context = ssl.create_default_context(cafile=str(self.certificate))
        if own is not None:
            context.load_cert_chain(own.certificate, own.key)
        return context
