"""Raise the limit of open files to what the connections need, or lower the number of connections to fit the limit.

A worker without a free descriptor cannot accept connections, so it cannot even answer /health.
"""

import logging
import resource

from shoal.engine.server.accepting import EXTRA_CONNECTIONS
from shoal.engine.server.settings import ServerSettings

log = logging.getLogger("shoal.supervisor")

_OTHER_FILES = 1024
"""The number of descriptors that a worker may need in addition to those of its clients' connections: for the store, the
store's tables, and everything else."""


def fit_connections(settings: ServerSettings) -> ServerSettings:
    """Raise the soft limit of open files of this process and its children, up to the hard limit. If the hard limit is
    too low for `max_connections`, log a warning, and return settings with a lower `max_connections`."""
    ports = 1 if settings.grpc_port is None else 2
    wanted = ports * settings.max_connections + EXTRA_CONNECTIONS + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return settings
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    if limit == wanted:
        return settings
    others = min(_OTHER_FILES, limit // 2)
    fitting = min(settings.max_connections, max(1, (limit - others - EXTRA_CONNECTIONS) // ports))
    if fitting < settings.max_connections:
        log.warning(
            "max_connections is %d and needs %d open files in each worker, but the limit is %d: each worker keeps %d "
            "connections%s; raise the hard limit of open files (ulimit -Hn, LimitNOFILE in systemd)",
            settings.max_connections,
            wanted,
            limit,
            fitting,
            "" if ports == 1 else " on each port",
        )
    return settings.model_copy(update={"max_connections": fitting})
