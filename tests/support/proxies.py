"""Run nginx or HAProxy in front of several instances of a service, as a reverse proxy with a pool of keep-alive connections."""

import contextlib
import os
import resource
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nanoservice.testing.valkey import free_port
from nanoservice.testing.waiting import SLACK, wait_for

_NGINX = """
daemon off;
master_process off;
pid {folder}/pid;
error_log {folder}/log warn;
worker_rlimit_nofile 20000;
events {{ worker_connections 10000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_timeout 600s;
    keepalive_requests 1000000000;
    upstream service {{
        {servers}
        keepalive 4000;
        keepalive_timeout 600s;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_request_buffering off;
        }}
    }}
}}
"""

# `redispatch` sends a request to the other instance if the first one refuses the connection. A request that was sent is never
# repeated.
_HAPROXY = """
global
    maxconn 5000
    tune.pool-high-fd-ratio 95
    tune.pool-low-fd-ratio 90
defaults
    mode http
    timeout connect 5s
    timeout client 600s
    timeout server 60s
    timeout http-keep-alive 600s
    retries 3
    option redispatch 1
    http-reuse always
frontend proxy
    bind 127.0.0.1:{port} backlog 4096
    default_backend service
backend service
    {check}
    {servers}
"""


def program(name: str) -> str:
    """Return the path of the proxy `name` in the folder PROXIES or, without PROXIES, on PATH."""
    found = shutil.which(name, path=os.environ.get("PROXIES") or os.environ["PATH"] + ":/usr/sbin")
    assert found, f"{name} is missing: run make test-proxies"
    return found


@contextlib.contextmanager
def proxy(name: str, ports: Sequence[int], folder: Path) -> Iterator[int]:
    """Run the proxy `name` in front of the ports, and yield its own port.

    `haproxy` checks `/readyz` of each instance; `haproxy without checks` and `nginx` learn that an instance is gone only from
    connections that fail.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # The clients and the proxy need a descriptor for each connection.
    folder.mkdir()
    port, config = free_port(), folder / "config"
    if name == "nginx":
        # Without `max_fails=0`, nginx would not use an instance for 10 s after a refused connection.
        servers = "\n        ".join(f"server 127.0.0.1:{one} max_fails=0;" for one in ports)
        config.write_text(_NGINX.format(folder=folder, port=port, servers=servers))
        command = [program("nginx"), "-p", str(folder), "-e", str(folder / "log"), "-c", str(config)]
    else:
        active = name == "haproxy"
        options = "pool-purge-delay 600s pool-max-conn -1" + (" check inter 1s fall 1 rise 1" if active else "")
        servers = "\n    ".join(f"server s{one} 127.0.0.1:{one} {options}" for one in ports)
        config.write_text(_HAPROXY.format(port=port, servers=servers, check="option httpchk GET /readyz" if active else ""))
        command = [program("haproxy"), "-db", "-f", str(config)]
    with (folder / "output").open("wb") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            wait_for(lambda: _listens(port) or process.poll() is not None, 10 * SLACK, f"{name} listens")
            assert process.poll() is None, (folder / "output").read_text()
            yield port
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def established(ports: Sequence[int]) -> list[int]:
    """Return the number of established connections on each local port."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    counts = Counter(line[1].partition(":")[2] for line in lines if line[3] == "01")
    return [counts[f"{port:04X}"] for port in ports]
