"""Servers that answer PING but do not keep the service's keys: a Sentinel, and a node of a cluster."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from nanoservice.testing.valkey import Valkey, free_port, program
from nanoservice.testing.waiting import SLACK, wait_for


class Sentinel(Valkey):
    """A Sentinel that watches no server."""

    def start(self, *options: str) -> None:
        file = self.data / "sentinel.conf"  # A Sentinel writes its state into this file.
        file.write_text(f"port {self.port}\nbind 127.0.0.1\ndir {self.data}\nloglevel warning\n")
        self.process = subprocess.Popen([program(), str(file), "--sentinel", *options], stdout=subprocess.DEVNULL)
        wait_for(self.answers, 10 * SLACK, "the Sentinel answers")


class Node(Valkey):
    """A node of a Redis Cluster. The node has no slots. If `moved`, another node has all slots, and does not run."""

    def __init__(self, data: Path, moved: bool) -> None:
        super().__init__(data, "--cluster-enabled", "yes", "--cluster-node-timeout", "60000")
        while self.port > 55535:  # The nodes talk to each other on a port that is 10,000 higher.
            self.port = free_port()
        if moved:
            nodes = f"{'a' * 40} 127.0.0.1:{self.port}@{self.port + 10000} myself,master - 0 0 1 connected\n"
            nodes += f"{'b' * 40} 127.0.0.1:1@10001 master - 0 0 2 connected 0-16383\nvars currentEpoch 2 lastVoteEpoch 0\n"
            (data / "nodes.conf").write_text(nodes)


@contextlib.contextmanager
def running(kind: str, data: Path) -> Iterator[Valkey]:
    """Run a server that has no key of the service: a "Sentinel", or a node that answers "CLUSTERDOWN" or "MOVED"."""
    server = Sentinel(data) if kind == "Sentinel" else Node(data, moved=kind == "MOVED")
    try:
        server.start()
        yield server
    finally:
        server.kill()
