"""The listening sockets of a service: opened by the service, or inherited from the process that started it."""

import errno
import logging
import resource
import socket
from collections.abc import Mapping
from typing import Any

from nanoservice.errors import StartError

BACKLOG = 4096  # connections that the kernel queues until they are accepted

# File descriptors reserved for Redis (81 at most), the log, the listening sockets, files, connections that may only send probes,
# and the admin port's connections.
_SPARE_DESCRIPTORS = 192

_INHERITED_FD = "LISTEN_FD"  # environment variable with the file descriptor of the inherited listening socket

_logger = logging.getLogger(__name__)


def bind(host: str, port: int, variable: str) -> socket.socket:
    """Return a socket that listens on `port` of `host`; an empty `host` and `::` mean all addresses, IPv6 and IPv4.

    Raises StartError, which names `variable` as the setting that chooses another port.
    """
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        address: tuple[Any, ...] = ("", port)
        if host:  # An IPv6 address has four parts; the last one is the interface of a link-local address.
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if address[0] == "::" and not both:
            _logger.warning("this system cannot listen on IPv6 and IPv4 with one socket: IPv4 is not served")
        return socket.create_server(address, family=family, dualstack_ipv6=both and family == socket.AF_INET6, backlog=BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise StartError(f"port {port} is in use: stop what uses it, or choose another port with {variable}=...") from error
        raise StartError(f"cannot listen on {host or 'all addresses'}, port {port} ({variable}): {error.strerror}") from error


def accept_queued(sock: socket.socket) -> list[socket.socket]:
    """Accept the connections that the kernel has queued for the listening socket `sock`, which must not block; return them."""
    accepted = []
    for _ in range(BACKLOG):
        try:
            accepted.append(sock.accept()[0])
        except BlockingIOError:
            break
        except OSError:  # The client of this connection is gone, or no file descriptor is free.
            continue
    return accepted


def child_environ(sock: socket.socket) -> dict[str, str]:
    """Return the variables that make a child process serve on `sock`. The child must inherit the file descriptor."""
    return {_INHERITED_FD: str(sock.fileno())}


def inherited_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """Return the public socket that the parent process opened, or None. The socket keeps listening when this process exits."""
    return socket.socket(fileno=int(environ[_INHERITED_FD])) if environ.get(_INHERITED_FD) else None


def max_connections() -> int:
    """Raise the limit on open files as far as allowed, and return the number of connections that the limit allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft = 0 if soft == resource.RLIM_INFINITY else soft
    wanted = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    while soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):  # macOS refuses more than kern.maxfilesperproc, although its hard limit is infinite.
            wanted //= 2
    return max(1, min(soft, 1 << 16) - _SPARE_DESCRIPTORS)
