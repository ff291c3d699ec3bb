"""Compare the service with its peers: `make bench`, or `make bench-quick` to check that the benchmark runs.

The benchmark needs two cores: the first runs only the servers under test, the second runs the load (wrk, or this process) and
Redis.
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
# The root folder of the Debian whose programs are used: wrk, nginx with its Lua module, webdis. `make bench` unpacks one.
DEBIAN = Path(os.environ.get("DEBIAN_ROOT") or "/")
CONNECTIONS = 64
HITS = "{hitcounter}:hits"
OPEN_RATE = 16_000  # requests per second of the open loop in which two versions of the service are compared
# count.lua calls these commands inside Redis. The service itself sends none of them, so they do not count as sent commands.
INSIDE_SCRIPT = {name.lower() for name in re.findall(r"redis\.call\('(\w+)'", SCRIPT)}
# wrk runs for whole seconds only. A window begins when the connections are open, and ends before wrk closes them.
WRK_SECONDS = 1
# This program runs the service under cProfile. The profile does not include the start of Python and the imports.
PROFILED = """
import cProfile, os, sys
from hitcounter.app import SERVICE
from nanoservice.server import main
cProfile.run("main(SERVICE, os.environ, [])", sys.argv[1])
"""


@dataclass(frozen=True)
class Plan:
    """The number of windows and rounds, and the length of each part of a round in seconds."""

    windows: int  # for each server and each number of connections
    connections: tuple[int, ...]
    rounds: int
    closed: float
    open: float
    profile: float


FULL = Plan(windows=16, connections=(1, 64, 256, 1000), rounds=3, closed=1.0, open=2.0, profile=5.0)
QUICK = Plan(windows=1, connections=(64, 1000), rounds=1, closed=0.3, open=0.3, profile=0.5)


@dataclass(frozen=True)
class Server:
    """A server under test. The words `PORT`, `FOLDER` and the like in its command are replaced: see `Process`."""

    name: str
    command: list[str]
    key: str | None = None  # the key in Redis that counts the requests; None if there is none
    path: str = "/"
    fsync: str = "always"
    counts_in_script: bool = False
    source: Path = ROOT
    config: Path | None = None


def servers(go: Path | None, before: Path | None) -> Iterator[Server]:
    """Yield the servers. Servers to compare are neighbours in this order, so that the conditions between them differ least."""
    python = sys.executable
    gunicorn = [python, "-m", "gunicorn", "--worker-class", "gthread", "--threads", "16", "--bind", "127.0.0.1:PORT"]
    uvicorn = [python, "-m", "uvicorn", "--no-access-log", "--log-level", "warning", "--port", "PORT"]
    if before:
        yield Server(report.BEFORE, [python, "-m", "hitcounter"], HITS, counts_in_script=True, source=before)
    yield Server(report.EVERYSEC, [python, "-m", "hitcounter"], HITS, fsync="everysec", counts_in_script=True)
    yield Server(report.SERVICE, [python, "-m", "hitcounter"], HITS, counts_in_script=True)
    yield Server(report.DICT, [python, str(PEERS / "dict_app.py")])
    if nginx := program("nginx", DEBIAN / "usr/lib/nginx/modules/ngx_http_lua_module.so"):
        yield Server(
            report.NGINX, [nginx, "-e", "stderr", "-p", "FOLDER", "-c", "CONFIG"], "nginx:hits", config=PEERS / "nginx.conf"
        )
    if webdis := program("webdis"):
        yield Server(report.WEBDIS, [webdis, "CONFIG"], "webdis:hits", path="/INCR/webdis:hits", config=PEERS / "webdis.json")
    if go:
        yield Server(report.GO, [str(go)], "go:hits")
    yield Server(report.AIOHTTP, [python, str(PEERS / "aiohttp_app.py")], "aiohttp:hits")
    yield Server(report.FASTAPI, [*uvicorn, "fastapi_app:app"], "fastapi:hits")
    yield Server(report.FLASK, [*gunicorn, "flask_app:app"], "flask:hits")


def program(name: str, *needs: Path) -> str | None:
    """Return the path of a program of Debian. If it or one of the files that it needs is missing, print this and return None."""
    found = shutil.which(name, path=f"{DEBIAN}/bin:{os.environ['PATH']}:/usr/sbin")
    missing = [str(file) for file in needs if not file.exists()]
    if found and not missing:
        return found
    print(f"{name} is skipped: {' and '.join(missing) or 'it'} is missing (bench/README.md says how to install it)")
    return None


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

    def __init__(self, server: Server, core: int, redis_port: int, data: Path) -> None:
        self.port = free_port()
        self.path = server.path
        folder = Path(tempfile.mkdtemp(dir=data))
        replaced = {"PORT": str(self.port), "FOLDER": str(folder), "CONFIG": str(folder / "config")}
        if server.config:
            text = server.config.read_text()
            for name, value in (("port", self.port), ("redis_port", redis_port), ("folder", folder), ("root", DEBIAN)):
                text = text.replace(f"{{{name}}}", str(value))
            (folder / "config").write_text(text)
        environ = {"PYTHONPATH": f"{server.source}:{PEERS}", "BIND_HOST": "127.0.0.1", "REDIS_HOST": "127.0.0.1"}
        ports = {"BIND_PORT": str(self.port), "ADMIN_PORT": "0", "REDIS_PORT": str(redis_port)}
        log = folder / "log"
        began = time.monotonic()
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [replaced.get(part, part.replace("PORT", str(self.port))) for part in server.command],
                env={"PATH": os.environ["PATH"]} | environ | ports, cwd=folder, stdout=output, stderr=output,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),  # noqa: PLW1509 - this process has no other thread
            )  # fmt: skip
        while self.ask() is None:
            if self._popen.poll() is not None or time.monotonic() - began > 30:
                self.end()
                raise SystemExit(f"bench: {server.command} does not answer:\n{log.read_text()[-2000:]}")
            time.sleep(0.002)
        self.start_seconds = time.monotonic() - began

    def ask(self, client: socket.socket | None = None) -> int | None:
        """Count a hit, over `client` or a new connection, and return its number, or None if the server does not answer."""
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            used = client or stack.enter_context(socket.create_connection(("127.0.0.1", self.port), 5))
            used.sendall(b"GET %b HTTP/1.1\r\nHost: localhost\r\n\r\n" % self.path.encode())
            head, _, body = used.recv(65536).partition(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 200 "):
                found = re.search(rb"\d+", body or used.recv(65536))
                return int(found[0]) if found else None
        return None

    def tree(self) -> list[Path]:
        """Return the folder in /proc of each of the server's processes."""
        found = [Path(f"/proc/{self._popen.pid}")]
        for folder in found:
            for children in folder.glob("task/*/children"):
                found += [Path(f"/proc/{pid}") for pid in children.read_text().split()]
        return found

    def cpu(self) -> float:
        """Return the seconds of processor time that the threads of the server's processes have used."""
        threads = [thread for folder in self.tree() for thread in folder.glob("task/*/schedstat")]
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9

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
    it = Load(process.port, connections, process.path)
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


def busy(core: int) -> float:
    """Return the seconds of user and system time that all processes together have used on the core."""
    found = re.search(rf"^cpu{core} (\d+) (\d+) (\d+)", Path("/proc/stat").read_text(), re.MULTILINE)
    assert found
    return sum(map(int, found.groups())) / os.sysconf("SC_CLK_TCK")


def wrk(process: Process, connections: int, mark: Callable[[], Any] = lambda: None) -> tuple[list[Any], int, int]:
    """Run wrk over `connections`. Return what `mark` returned at both ends of a window, the number of requests, and of errors."""
    command = [str(program("wrk")), "-t1", f"-c{connections}", f"-d{WRK_SECONDS}s", "--timeout=10s"]
    began = time.monotonic()
    with subprocess.Popen([*command, f"http://127.0.0.1:{process.port}{process.path}"], stdout=subprocess.PIPE, text=True) as run:
        marks = []
        for at in (report.WINDOW_BEGINS, report.WINDOW_ENDS):
            time.sleep(max(0.0, began + at - time.monotonic()))
            marks.append(mark())
        text, _ = run.communicate()
    answers = re.search(r"(\d+) requests in", text)
    if run.returncode or not answers:
        raise SystemExit(f"bench: wrk failed: {text}")
    lost = sum(map(int, re.findall(r"(?:connect|read|write|timeout) (\d+)", text)))
    refused = re.search(r"responses: (\d+)", text)
    return marks, int(answers[1]) + lost, lost + (int(refused[1]) if refused else 0)


def window(server: Server, process: Process, connections: int, core: int, store: "redis.Redis") -> report.Figures:
    """Measure one window of a closed loop. The number of requests comes from Redis, or from the server if Redis has none."""
    # Under load, an open connection gets its answer sooner than a new connection.
    client = socket.create_connection(("127.0.0.1", process.port), 5)

    def mark() -> tuple[float, int, float, float]:
        number = int(store.get(server.key) or 0) if server.key else process.ask(client) or 0  # type: ignore[arg-type] # not async
        return time.monotonic(), number, process.cpu(), busy(core)

    with client:
        (begins, ends), sent, failed = wrk(process, connections, mark)
    seconds, requests, cpu, all_cpu = (end - begin for begin, end in zip(begins, ends, strict=True))
    figures = {"failed": failed, "errors": failed / max(1, sent), "others": max(0.0, all_cpu - cpu) / seconds}
    if requests < 1:
        return figures
    return figures | {"rate": requests / seconds, "cpu": cpu / requests * 1e6}


def windows(
    tested: list[Server], plan: Plan, core: int, stores: dict[str, "redis.Redis"], data: Path
) -> Iterator[tuple[str, int, report.Figures]]:
    """Run all servers at the same time, measure one of them after the other, and yield each window's figures.

    A server without load uses no CPU time. So the windows of two servers are close together, and have the same conditions.
    """
    with contextlib.ExitStack() as stack:
        processes = []
        for server in tested:
            processes.append(Process(server, core, port_of(stores[server.fsync]), data))
            stack.callback(processes[-1].end)
        for number in range(plan.windows):
            for connections in plan.connections:
                for server, process in zip(tested, processes, strict=True):
                    figures = window(server, process, connections, core, stores[server.fsync])
                    yield server.name, connections, figures
                    text = (
                        f"{figures['rate']:,.0f} requests/s, {figures['cpu']:.1f} µs each" if "rate" in figures else "only errors"
                    )
                    print(f"{number + 1}. {connections:4} {server.name}: {text}", flush=True)


def port_of(store: "redis.Redis") -> int:
    return int(store.connection_pool.connection_kwargs["port"])


def alone(server: Server, rate: float, plan: Plan, core: int, stores: dict[str, "redis.Redis"], data: Path) -> report.Figures:
    """Start the server alone, measure the figures that a load of wrk does not show, and stop the server.

    `rate` is the number of requests per second that the server has carried over 64 connections.
    """
    store = stores[server.fsync]
    process = Process(server, core, port_of(store), data)
    try:
        full = load(process, CONNECTIONS, lambda it: it.closed(plan.closed, 0.1, lambda: commands(store, server)))
        if not full.answered:
            raise SystemExit(f"bench: {server.name} answers no request: {full.errors}")
        figures = {
            "start": process.start_seconds,
            "commands": (full.marks[1] - full.marks[0]) / full.answered,
            "duplicates": full.duplicates / len(full.numbers),
            "pss": process.pss(),
        }
        for key, wanted in (("", rate / 2), ("_open", OPEN_RATE)):
            if not key or (server.name in (report.SERVICE, report.BEFORE) and rate > OPEN_RATE):
                half = load(process, CONNECTIONS, lambda it: it.open(plan.open, wanted))  # noqa: B023 - called at once
                cuts = quantiles((seconds * 1000 for seconds in half.latencies), n=100, method="inclusive")
                figures |= {f"half{key}": wanted, f"p50{key}": cuts[49], f"p99{key}": cuts[98]}
        wrk(process, 1000)
        return figures | {"pss_1000": process.pss()}
    finally:
        process.end()


def profile(plan: Plan, core: int, store: "redis.Redis", data: Path) -> str:
    """Return the service's functions as a Markdown table, ordered by their own time, the longest first."""
    server = Server("the service under cProfile", [sys.executable, "-c", PROFILED, str(data / "profile")])
    process = Process(server, core, port_of(store), data)
    try:
        it = load(process, CONNECTIONS, lambda it: it.closed(plan.profile))
    finally:
        process.end()
    stats: dict[Any, Any] = pstats.Stats(str(data / "profile")).stats  # type: ignore[attr-defined] # not in typeshed
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


def versions_of(store: "redis.Redis", go: Path | None) -> dict[str, str]:
    """Return the versions of the programs that take part and are not Python packages."""
    versions = {"Valkey": store.info("server").get("valkey_version", "?")}
    for name, option in (("wrk", "-v"), ("nginx", "-v")):
        if found := program(name):
            ended = subprocess.run([found, option], capture_output=True, text=True, check=False)
            if number := re.search(r"\d+\.\d+\.\d+", ended.stdout + ended.stderr):
                versions[name] = number[0]
    if go:
        built = subprocess.check_output(["go", "version", "-m", go], text=True)
        versions["Go"], versions["go-redis"] = re.findall(r"(?:: go|go-redis/v9\tv)(\S+)", built)
    return versions


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="run one short round, to check that all parts work; write nothing")
    quick = parser.parse_args().quick
    plan = QUICK if quick else FULL
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if len(cores) < 2:
        print("bench: the benchmark needs Linux and two cores", file=sys.stderr)
        return 1
    if not program("wrk"):
        return 1
    # Raise the limit on open files: this process and each server need a file descriptor for each of 1,000 connections.
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limit, 1 << 16) if limit > 0 else 1 << 16, limit))
    data = ROOT / ".data"  # Use the checkout's disk. /tmp may be in memory, where a sync costs nothing.
    data.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=data)))
        go = build_go(folder)
        before = Path(os.environ["BEFORE"]).absolute() if os.environ.get("BEFORE") else None
        tested = list(servers(go, before))
        core = cores[0]
        os.sched_setaffinity(0, {cores[1]})
        stores = {}
        for fsync in ("always", "everysec"):
            port = free_port()
            stack.enter_context(
                embedded.valkey(folder / fsync, "--port", str(port), "--bind", "127.0.0.1", "--appendfsync", fsync)
            )
            stores[fsync] = redis.Redis(port=port)
        results = report.Results()
        for name, connections, figures in windows(tested, plan, core, stores, folder):
            results.windows.setdefault((name, connections), []).append(figures)
        for number in range(plan.rounds):
            for server in tested:
                rate = median(figures["rate"] for figures in results.windows[server.name, CONNECTIONS])
                results.rounds.setdefault(server.name, []).append(alone(server, rate, plan, core, stores, folder))
                print(f"{number + 1}. {server.name} alone", flush=True)
        profiled = profile(plan, core, stores["always"], folder)
        others = median(figures["others"] for measured in results.windows.values() for figures in measured)
        conditions = (
            f"{report.machine(versions_of(stores['always'], go))}\n"
            f"A sync of a small write took {sync_ms(folder):.2f} ms (median).\n"
            f"During the windows, other processes used {others:.0%} of the servers' core (median).\n"
            "On a quiet machine this share is 0%; the higher it is, the less reliable the figures are."
        )
    print(f"\n{report.tables(results)}\n\n{conditions}\n\n{profiled}")
    if quick:
        print("\nThis was a quick run: its figures mean little, and no file was written.")
    else:
        (HERE / "results.md").write_text(report.markdown(results, conditions, profiled))
        (HERE / "results.svg").write_text(report.svg(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
