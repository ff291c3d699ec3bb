"""The sockets that a service listens on: its own, or one that was opened before it."""

import errno
import socket
from collections.abc import Mapping

from nanoservice.config import StartError

BACKLOG = 4096  # connections that the kernel holds until they are taken

_HANDED = "LISTEN_FD"  # the variable that names the descriptor of a socket which is open already


def bind(host: str, port: int, variable: str) -> socket.socket:
    """Return a socket that listens on `port` of `host`; if that is empty, of all addresses, IPv6 and IPv4.

    Raises StartError, naming `variable`, the setting that would choose another port.
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
            raise StartError(f"port {port} is in use: end what uses it, or choose another with {variable}=...") from error
        raise StartError(f"cannot listen on {host or 'all addresses'}, port {port} ({variable}): {error.strerror}") from error


def hand(sock: socket.socket) -> dict[str, str]:
    """Return the variables that have a child process serve on `sock`, whose descriptor it must inherit."""
    return {_HANDED: str(sock.fileno())}


def handed(environ: Mapping[str, str]) -> socket.socket | None:
    """Return the public socket that the parent process opened, if it did; it goes on listening when this process ends."""
    return socket.socket(fileno=int(environ[_HANDED])) if environ.get(_HANDED) else None
