"""Simulated machines for benchmarks: network namespaces on one bridge, with links that can be slowed down and cut.

Their traffic never leaves this machine. This needs root and iproute2.
"""

import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

_SUBNET = "10.77.0"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@dataclass(frozen=True)
class Host:
    """A simulated machine: its network namespace and address, and its port in the bridge's namespace `switch`."""

    namespace: str
    address: str
    switch: str
    port: str

    def command(self, command: Sequence[object]) -> list[str]:
        """Return the command line that runs a command in this namespace."""
        return ["ip", "netns", "exec", self.namespace, *map(str, command)]

    def cut(self) -> None:
        """Cut the link of this host. Packets to and from the host are then lost silently."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def join(self) -> None:
        """Restore the link of this host."""
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def slow(self, kilobits: int) -> None:
        """Limit the sending rate of this host in kilobits per second. Packets that wait longer than 400 ms are lost."""
        shaping = f"dev eth0 root tbf rate {kilobits}kbit burst 32kb latency 400ms"
        subprocess.run(["tc", "-n", self.namespace, "qdisc", "replace", *shaping.split()], check=True)

    def hasten(self) -> None:
        """Remove the limit on the sending rate of this host."""
        subprocess.run(["tc", "-n", self.namespace, "qdisc", "del", "dev", "eth0", "root"], check=True)


@contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """Create `count` hosts that can reach each other and nothing else."""
    switch = f"shoal-{os.getpid()}"
    made = [switch]
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        found = []
        for number in range(1, count + 1):
            host = Host(f"{switch}-{number}", f"{_SUBNET}.{number}", switch, f"port{number}")
            _ip("netns", "add", host.namespace)
            made.append(host.namespace)
            _ip("link", "add", host.port, "netns", switch, "type", "veth", "peer", "eth0", "netns", host.namespace)
            _ip("-n", switch, "link", "set", host.port, "master", "bridge", "up")
            _ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", host.namespace, "link", "set", device, "up")
            found.append(host)
        yield found
    finally:
        for namespace in reversed(made):
            subprocess.run(["ip", "netns", "del", namespace], check=False, capture_output=True)
