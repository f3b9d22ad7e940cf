"""A real server of the S3 protocol for tests: versitygw over a directory, as `make test` builds it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from shoal.engine.root.s3_client import s3_client
from tests.server.serving import eventually

BUILT = Path(__file__).parents[2] / ".s3-server" / "versitygw"
BUCKET = "features"
ACCESS = {
    "AWS_ACCESS_KEY_ID": "shoal",
    "AWS_SECRET_ACCESS_KEY": "shoal-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
"""The environment variables that a client needs besides AWS_ENDPOINT_URL."""


def versitygw() -> str | None:
    """Return the path of the server's program, or None if it is missing."""
    return str(BUILT) if BUILT.exists() else shutil.which("versitygw")


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


def turn_a_byte(disk: Path, address: str) -> None:
    """Damage the object at an address on the server's disk."""
    path = disk / "objects" / address.removeprefix("s3://")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@contextmanager
def running(directory: Path, program: str) -> Iterator[str]:
    """Run a server with one bucket that stores its objects in a directory, and yield its URL."""
    address = f"127.0.0.1:{free_port()}"
    for part in ("objects", "metadata"):
        (directory / part).mkdir()
    command = [program, "--quiet", "--port", address, "--keep-alive", "posix"]
    command += ["--sidecar", str(directory / "metadata"), str(directory / "objects")]
    with (directory / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | _owner())
    try:
        eventually(lambda: listens(address, process), "the S3 server")
        s3_client(f"http://{address}").create_bucket(Bucket=BUCKET)
        yield f"http://{address}"
    finally:
        process.kill()
        process.wait()


def _owner() -> Mapping[str, str]:
    return {"ROOT_ACCESS_KEY": ACCESS["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": ACCESS["AWS_SECRET_ACCESS_KEY"]}


def listens(address: str, process: subprocess.Popen[bytes]) -> bool:
    """Return whether something listens at an address, after asserting that the server's process is still running."""
    assert process.poll() is None, "the server ended"
    host, _, port = address.partition(":")
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0
