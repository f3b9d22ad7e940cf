"""The notifications that systemd expects from a service of Type=notify: one datagram for each change of state."""

import os
import socket
from contextlib import suppress

_VARIABLE = "NOTIFY_SOCKET"


def notify_systemd(state: str) -> None:
    """Send a state from the list in sd_notify(3), if systemd set NOTIFY_SOCKET. Ignore errors, and never block."""
    address = os.environ.get(_VARIABLE)
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.sendto(state.encode(), name)
