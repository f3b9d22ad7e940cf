"""What systemd is told of a service of Type=notify: one datagram, where there is somebody who listens."""

import os
import socket
from contextlib import suppress

_VARIABLE = "NOTIFY_SOCKET"


def notify(state: str) -> None:
    """Send a state, as sd_notify(3) lists them. Whoever does not take it holds nothing up."""
    address = os.environ.get(_VARIABLE)
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(state.encode(), name)
