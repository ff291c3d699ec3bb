"""The listening sockets of a service: opened by the service, or inherited from the process that started it."""

import errno
import socket
from collections.abc import Mapping

from nanoservice.errors import StartError

BACKLOG = 4096  # connections that the kernel queues until they are accepted

_INHERITED_FD = "LISTEN_FD"  # environment variable with the file descriptor of the inherited listening socket


def bind(host: str, port: int, variable: str) -> socket.socket:
    """Return a socket that listens on `port` of `host`; an empty `host` means all addresses, IPv6 and IPv4.

    Raises StartError, which names `variable` as the setting that chooses another port.
    """
    try:
        if host:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            return socket.create_server(address[:2], family=family, backlog=BACKLOG)
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=BACKLOG)
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
