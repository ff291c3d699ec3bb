"""Compare the service with its peers: `make bench`, or `make bench-quick` to check that the benchmark runs.

The benchmark needs two cores: the first runs only the server under test, the second runs this process (the load) and Redis.
"""

import argparse
import asyncio
import contextlib
import gc
import os
import pstats
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import redis
import uvloop

from bench import report
from bench.load import Load
from hitcounter.counter import SCRIPT
from nanoservice import embedded

HERE = Path(__file__).parent
ROOT = HERE.parent
PEERS = HERE / "peers"
CONNECTIONS = 64
# count.lua calls these commands inside Redis. The service itself sends none of them, so they do not count as sent commands.
INSIDE_SCRIPT = {name.lower() for name in re.findall(r"redis\.call\('(\w+)'", SCRIPT)}
# This program runs the service under cProfile. The profile does not include the start of Python and the imports.
PROFILED = """
import cProfile, os, sys
from hitcounter.app import SERVICE
from nanoservice.server import main
cProfile.run("main(SERVICE, os.environ, [])", sys.argv[1])
"""


@dataclass(frozen=True)
class Plan:
    """The number of rounds, and the length of each part of a run in seconds."""

    rounds: int  # the highest number of rounds
    limit: float  # a round begins only if it will probably end before this time
    warm: float
    closed: float
    open: float
    crowd: float  # the length of each load over 256 or 1,000 connections
    profile: float


FULL = Plan(rounds=5, limit=320, warm=0.5, closed=2.0, open=2.0, crowd=1.0, profile=5.0)
QUICK = Plan(rounds=1, limit=50, warm=0.1, closed=0.4, open=0.3, crowd=0.2, profile=0.5)


@dataclass(frozen=True)
class Server:
    """A server under test. The word `PORT` in its command stands for the port that the server listens on."""

    name: str
    command: list[str]
    fsync: str = "always"
    counts_in_script: bool = False
    throughput_only: bool = False


def servers(go: Path | None) -> Iterator[Server]:
    """Yield the servers. Servers to compare are neighbours in this order, so that the conditions between them differ least."""
    python = sys.executable
    gunicorn = [python, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "16", "--bind", "127.0.0.1:PORT"]
    uvicorn = [python, "-m", "uvicorn", "--no-access-log", "--log-level", "warning", "--port", "PORT"]
    yield Server(report.EVERYSEC, [python, "-m", "hitcounter"], "everysec", counts_in_script=True, throughput_only=True)
    yield Server(report.SERVICE, [python, "-m", "hitcounter"], counts_in_script=True)
    yield Server(report.DICT, [python, str(PEERS / "dict_app.py")])
    if go:
        yield Server(report.GO, [str(go)])
    yield Server(report.AIOHTTP, [python, str(PEERS / "aiohttp_app.py")])
    yield Server(report.FASTAPI, [*uvicorn, "fastapi_app:app"])
    yield Server(report.FLASK, [*gunicorn, "flask_app:app"])


def build_go(folder: Path) -> Path | None:
    """Build the Go peer and return its path. If it cannot be built, print the reason and return None."""
    go = shutil.which("go")
    if not go:
        print("the Go peer is skipped: there is no `go` in PATH")
        return None
    built = subprocess.run(
        [go, "build", "-buildvcs=false", "-o", str(folder / "go-peer"), "."],
        cwd=PEERS / "go", env={**os.environ, "GOTOOLCHAIN": "local"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if built.returncode:
        print(f"the Go peer is skipped, because it cannot be built: {built.stderr.strip()}")
        return None
    return folder / "go-peer"


class Process:
    """A running server."""

    def __init__(self, command: list[str], core: int, redis_port: int, log: Path) -> None:
        self.port = free_port()
        ports = {"BIND_PORT": str(self.port), "ADMIN_PORT": "0", "REDIS_PORT": str(redis_port)}
        environ = {"PYTHONPATH": f"{ROOT}:{PEERS}", "BIND_HOST": "127.0.0.1", "REDIS_HOST": "127.0.0.1"}
        began = time.monotonic()
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [part.replace("PORT", str(self.port)) for part in command],
                env=environ | ports, cwd=log.parent, stdout=output, stderr=output, start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509 - this process has no other thread
            )  # fmt: skip
        while not self._answers():
            if self._popen.poll() is not None or time.monotonic() - began > 30:
                self.end()
                raise SystemExit(f"bench: {command} does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(0.002)
        self.start_seconds = time.monotonic() - began

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return client.recv(64).startswith(b"HTTP/1.1 200 ")
        return False

    def tree(self) -> list[Path]:
        """Return the folder in /proc of each of the server's processes."""
        found = [Path(f"/proc/{self._popen.pid}")]
        for folder in found:
            for children in folder.glob("task/*/children"):
                found += [Path(f"/proc/{pid}") for pid in children.read_text().split()]
        return found

    def cpu(self) -> float:
        """Return the seconds of user and system time that the server's processes have used, including finished processes."""
        return sum(cpu_of(folder) for folder in self.tree())

    def pss(self) -> float:
        """Return the memory (Pss) of the server's processes in MB."""
        texts = [(folder / "smaps_rollup").read_text() for folder in self.tree()]
        return sum(int(size) for text in texts for size in re.findall(r"^Pss: +(\d+) kB", text, re.MULTILINE)) * 1024 / 1e6

    def end(self) -> None:
        """Stop the server; kill its processes if it does not exit within 10 s."""
        self._popen.send_signal(signal.SIGTERM)
        try:
            self._popen.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(self._popen.pid, signal.SIGKILL)
            self._popen.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def load(process: Process, connections: int, how: Callable[[Load], Any]) -> Load:
    """Send requests to the server in the way that `how` chooses, and return the finished load with its figures."""
    it = Load(process.port, connections)
    gc.disable()  # A pause of this process's garbage collector would look like a slow answer of the server.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(how(it))
    gc.enable()
    gc.collect()
    return it


def commands(store: "redis.Redis", server: Server) -> int:
    """Return the number of commands that the server has sent to Redis. Leave out those of this process and of the script."""
    ours = {"info"} | (INSIDE_SCRIPT if server.counts_in_script else set())
    stats = {name.removeprefix("cmdstat_"): stat["calls"] for name, stat in store.info("commandstats").items()}
    return sum(calls for name, calls in stats.items() if name not in ours)


def cpu_of(folder: Path) -> float:
    """Return the seconds of user and system time of a process (its folder in /proc) and of its finished children."""
    ticks = (folder / "stat").read_text().rpartition(")")[2].split()[11:15]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def busy(core: int) -> float:
    """Return the seconds of user and system time that all processes together have used on the core."""
    found = re.search(rf"^cpu{core} (\d+) (\d+) (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    assert found
    return sum(map(int, found.groups())) / os.sysconf("SC_CLK_TCK")


def measure(server: Server, plan: Plan, core: int, stores: dict[str, "redis.Redis"], folder: Path) -> report.Figures:
    """Start the server, measure all its figures, and stop it."""
    store = stores[server.fsync]
    redis_folder = Path(f"/proc/{store.info('server')['process_id']}")
    (own_core,) = os.sched_getaffinity(0)

    def used() -> tuple[float, float, float, int]:
        cpu, load_cpu = process.cpu(), cpu_of(redis_folder) + time.process_time()
        return cpu, busy(core) - cpu, busy(own_core) - load_cpu, commands(store, server)

    process = Process(server.command, core, store.connection_pool.connection_kwargs["port"], folder / "server.log")
    try:
        full = load(process, CONNECTIONS, lambda it: it.closed(plan.closed, plan.warm, used))
        if not full.answered:
            raise SystemExit(f"bench: {server.name} answers no request: {full.errors}")
        cpu, others, others_at_load, sent = (end - start for start, end in zip(*full.marks, strict=True))
        figures = {
            "start": process.start_seconds,
            "rate": full.answered / full.seconds,
            "cpu": cpu / full.answered * 1e6,
            "others": max(0.0, others) / full.seconds,
            "others_at_load": max(0.0, others_at_load) / full.seconds,
            "commands": sent / full.answered,
            "duplicates": full.duplicates / len(full.numbers),
            "pss": process.pss(),
        }
        if server.throughput_only:
            return figures
        half = load(process, CONNECTIONS, lambda it: it.open(plan.open, figures["rate"] / 2))
        cuts = quantiles((seconds * 1000 for seconds in half.latencies), n=100)
        figures |= {"half": figures["rate"] / 2, "p50": cuts[49], "p99": cuts[98]}
        for crowd in (256, 1000):
            it = load(process, crowd, lambda it: it.closed(plan.crowd))
            figures[f"errors_{crowd}"] = it.failed / (it.failed + len(it.numbers))
            figures[f"failed_{crowd}"] = it.failed
        return figures | {"pss_1000": process.pss()}
    finally:
        process.end()


def profile(plan: Plan, core: int, store: "redis.Redis", folder: Path) -> str:
    """Return the service's functions as a Markdown table, ordered by their own time, the longest first."""
    command = [sys.executable, "-c", PROFILED, str(folder / "profile")]
    process = Process(command, core, store.connection_pool.connection_kwargs["port"], folder / "server.log")
    try:
        it = load(process, CONNECTIONS, lambda it: it.closed(plan.profile))
    finally:
        process.end()
    stats: dict[Any, Any] = pstats.Stats(str(folder / "profile")).stats  # type: ignore[attr-defined] # not in typeshed
    total = sum(own for _, _, own, _, _ in stats.values())
    rows = ["| share | calls/request | function |", "| ---: | ---: | --- |"]
    for (file, line, name), (_, calls, own, _, _) in sorted(stats.items(), key=lambda item: -item[1][2])[:20]:
        where = "" if file == "~" else f"{'/'.join(Path(file).parts[-2:])}:{line} "
        rows.append(f"| {own / total:.1%} | {calls / len(it.numbers):.2f} | `{where}{name}` |")
    return "\n".join(rows)


def sync_ms(folder: Path) -> float:
    """Return the time that the disk takes to sync a small write, in milliseconds (the median of 100 writes)."""
    times = []
    with (folder / "sync").open("wb", buffering=0) as file:
        for _ in range(100):
            file.write(b"x" * 200)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return median(times) * 1000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run one short round, to check that all parts work; write nothing")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        print("bench: the benchmark needs Linux and two cores", file=sys.stderr)
        return 1
    # Raise the limit on open files: this process and each server need a file descriptor for each of 1,000 connections.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 1 << 16) if limit > 0 else 1 << 16, limit))
    data = ROOT / ".data"  # Use the checkout's disk. /tmp may be in memory, where a sync costs nothing.
    data.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=data)))
        go = build_go(folder)
        core = cores[0]
        os.sched_setaffinity(0, {cores[1]})
        stores = {}
        for fsync in ("always", "everysec"):
            port = free_port()
            stack.enter_context(
                embedded.valkey(folder / fsync, "--port", str(port), "--bind", "127.0.0.1", "--appendfsync", fsync)
            )
            stores[fsync] = redis.Redis(port=port)
        rounds: report.Rounds = {}
        began = time.monotonic()
        for number in range(plan.rounds):
            if number and (time.monotonic() - began) * (number + 1) / number > plan.limit:
                print(f"there is time for only {number} rounds: this machine is busy")
                break
            for server in servers(go):
                figures = measure(server, plan, core, stores, folder)
                rounds.setdefault(server.name, []).append(figures)
                rate, cpu = figures["rate"], figures["cpu"]
                print(f"{number + 1}. {server.name}: {rate:,.0f} requests/s, {cpu:.1f} µs each", flush=True)
        profiled = profile(plan, core, stores["always"], folder)
        versions = {"Valkey": stores["always"].info("server").get("valkey_version", "?")}
        if go:
            built = subprocess.check_output(["go", "version", "-m", go], text=True)
            versions["Go"], versions["go-redis"] = re.findall(r"(?:: go|go-redis/v9\tv)(\S+)", built)
        others, others_at_load = (
            median(figures[key] for measured in rounds.values() for figures in measured) for key in ("others", "others_at_load")
        )
        conditions = (
            f"{report.machine(versions)}\n"
            f"A sync of a small write took {sync_ms(folder):.2f} ms (median).\n"
            f"During the rounds, other processes used {others:.0%} of the server's core and {others_at_load:.0%} of the other "
            "core (medians).\n"
            "On a quiet machine both shares are 0%; the higher they are, the less reliable the figures are."
        )
    print(f"\n{report.table(rounds)}\n\n{report.target_table(rounds)}\n\n{conditions}\n\n{profiled}")
    if quick:
        print("\nThis was a quick run: its figures mean little, and no file was written.")
    else:
        (HERE / "results.md").write_text(report.markdown(rounds, plan.closed, conditions, profiled))
        (HERE / "results.svg").write_text(report.svg(rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
