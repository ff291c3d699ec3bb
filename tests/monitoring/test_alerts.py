"""Each fault fires exactly its alerts, on a real Prometheus and a real Alertmanager that scrape real services.

Each row of the table below is a service of its own, with a Redis of its own, and all faults begin at about the same time. Each
window and each duration of the rules is divided by FACTOR, and so is the interval between two scrapes. The time limits of the
services stay as they are.
"""

import asyncio
import contextlib
import itertools
import re
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from nanoservice.testing.replicated import Replicated
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, eventually
from tests.support.failing_task import FAILING_TASK
from tests.support.process import Process, Spawn, spawning
from tests.support.prometheus import Alertmanager, Prometheus, alerts, shortened, shortened_rules
from tests.support.relay import relaying
from tests.support.tls import TlsFront

pytestmark = [pytest.mark.monitoring, pytest.mark.asyncio(loop_factories=["asyncio"])]  # Replicated can crash uvloop

FACTOR = 30
WARM_UP = 8  # seconds without a fault
LASTS = 60  # seconds from the beginning of the faults to the end of the test
OWN = 6  # seconds that the service needs to notice a fault, and Prometheus to scrape it
# The minutes, before they are divided by FACTOR, within which an alert fires if nothing works any more.
PROMISED = {
    "AvailabilityBurnsFast": 5, "AvailabilityBurnsSlowly": 22, "LatencyBurnsFast": 12, "LatencyBurnsSlowly": 30,
    "RedisUnusable": 2, "RedisIsFull": 2, "CountsLost": 1, "RedisReplicaMissing": 7, "RedisCertificateExpires": 12,
    "RestartsInARow": 10, "BackgroundTaskFails": 7, "RequestsShed": 7, "NotScraped": 7,
}  # fmt: skip
BURNS = "AvailabilityBurnsFast", "AvailabilityBurnsSlowly"
MOST_CLIENTS = 8
IMPATIENT = {"REQUEST_TIMEOUT": "1", "REDIS_TIMEOUT": "0.5"}


@dataclass
class Row:
    """A service, its fault, and the alerts that the fault fires. Its clients send about ten requests a second each."""

    name: str
    fires: tuple[str, ...]
    fault: Callable[["Row"], Coroutine[Any, Any, None]]
    settings: dict[str, str] = field(default_factory=dict)
    clients: int = 1  # Only a fault may add more, up to MOST_CLIENTS.
    instances: int = 1
    command: tuple[str, ...] = ()  # starts the service; without it, the command is `python -m hitcounter`
    lasts: bool = True  # A fault that is repeated ends when this is false.
    store: Any = None  # what stands in front of Redis or is its replicated form
    serving: list[Process] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    async def start(self, folder: Path, stack: contextlib.AsyncExitStack, spawn: Spawn) -> None:
        folder.mkdir()
        self.spawn, self.valkey = spawn, Valkey(folder)
        self.folder = folder
        environ = self.valkey.environ
        if self.name == "a replica is killed":
            self.store = await stack.enter_async_context(Replicated(folder / "store").running())
            environ = self.store.environ
        else:
            await asyncio.to_thread(self.valkey.start)
            stack.callback(self.valkey.kill)
        if self.name.startswith("the certificate"):
            self.store = TlsFront(self.valkey, folder)
            await self.store.start(expires=datetime.now(UTC) + timedelta(days=90))
            stack.callback(lambda: self.store.server.close())
            environ = self.store.environ
        if self.name in ("Redis is slow", "the queue is full"):
            self.store, port = await stack.enter_async_context(relaying(self.valkey.port))
            self.settings["REDIS_PORT"] = str(port)
        if self.name == "the password is rotated":
            self.valkey.run("ACL", "SETUSER", "hitcounter", "on", ">one", "~*", "+@all")
            (folder / "password").write_text("one")
            self.settings |= {"REDIS_USERNAME": "hitcounter", "REDIS_PASSWORD_FILE": str(folder / "password")}
        # Only a fault may make requests fail, and not a busy machine.
        self.environ = environ(
            **{"BIND_HOST": "127.0.0.1", "REQUEST_TIMEOUT": "9", "REDIS_TIMEOUT": "3", "DRAIN_SECONDS": "1", **self.settings}
        )
        await asyncio.gather(*(self.add() for _ in range(self.instances)))

    async def add(self, target: int = 0) -> Process:
        """Start an instance of the service."""
        if not target:
            self.targets.append(target := free_port())
        process = await asyncio.to_thread(self.spawn, self.environ | {"ADMIN_PORT": str(target)}, self.folder, self.command)
        self.serving.append(process)
        return process

    async def replace(self, how: int) -> None:
        """Stop an instance, and start it again with the same target."""
        process = self.serving.pop(0)
        await asyncio.to_thread(process.end, how)
        await self.add(process.admin_port)

    async def send(self, number: int) -> None:
        """Send requests as client `number`, for as long as there are so many clients."""
        timeout = aiohttp.ClientTimeout(total=20)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for turn in itertools.count(number):
                if number < self.clients and self.serving:
                    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                        async with session.get(self.serving[turn % len(self.serving)].url) as answer:
                            await answer.read()
                await asyncio.sleep(0.1)


async def nothing(row: Row) -> None:
    pass


async def kill_redis(row: Row) -> None:
    await asyncio.to_thread(row.valkey.kill)


async def freeze_redis(row: Row) -> None:
    row.valkey.freeze()


async def fill_redis(row: Row) -> None:
    await asyncio.to_thread(row.valkey.run, "CONFIG", "SET", "maxmemory", "1")


async def make_redis_read_only(row: Row) -> None:
    await asyncio.to_thread(row.valkey.run, "REPLICAOF", "127.0.0.1", "1")


async def set_counts_back(row: Row) -> None:
    await asyncio.to_thread(row.valkey.run, "SET", "{hitcounter}:hits", "1")


async def kill_in_a_loop(row: Row) -> None:
    row.serving.pop()  # This instance stays. If no instance answered during a slow start, NotScraped would fire too.
    while row.lasts:
        await row.replace(signal.SIGKILL)
        await asyncio.sleep(1.5)


async def let_the_task_fail(row: Row) -> None:
    (row.folder / "fails").touch()


async def kill_for_good(row: Row) -> None:
    await asyncio.to_thread(row.serving.pop().end, signal.SIGKILL)


async def slow_redis_down(row: Row) -> None:
    row.store.delay = 0.2


async def fill_the_queue(row: Row) -> None:
    row.store.delay, row.clients = 0.02, MOST_CLIENTS


async def renew_the_certificate_too_late(row: Row) -> None:
    row.store.server.close()
    await row.store.start(expires=datetime.now(UTC) + timedelta(days=13))
    await asyncio.to_thread(row.valkey.run, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


async def kill_a_replica(row: Row) -> None:
    await asyncio.to_thread(next(server for server in row.store.servers if server.role() == "slave").kill)


async def restart_one_by_one(row: Row) -> None:
    for _ in range(2):
        await row.replace(signal.SIGTERM)


async def scale_out(row: Row) -> None:
    await row.add()


async def rotate_the_password(row: Row) -> None:
    for *command, password in (("ACL", "SETUSER", "hitcounter", ">two"), ("ACL", "SETUSER", "hitcounter", "<one")):
        await asyncio.to_thread(row.valkey.run, *command, password)
        (row.folder / "password").write_text("two")
    await asyncio.to_thread(row.valkey.run, "CLIENT", "KILL", "USER", "hitcounter")


def table() -> list[Row]:
    return [
        Row("Redis is killed", ("RedisUnusable", *BURNS), kill_redis, IMPATIENT.copy()),
        Row("Redis is frozen", ("RedisUnusable", *BURNS), freeze_redis, IMPATIENT.copy()),
        Row("Redis is full", ("RedisUnusable", "RedisIsFull", *BURNS), fill_redis, IMPATIENT.copy()),
        Row("Redis is read-only", ("RedisUnusable", *BURNS), make_redis_read_only, IMPATIENT.copy()),
        Row("Redis is slow", ("LatencyBurnsFast", "LatencyBurnsSlowly"), slow_redis_down),
        Row("the counts are set back", ("CountsLost",), set_counts_back),
        Row("the certificate is about to expire", ("RedisCertificateExpires",), renew_the_certificate_too_late),
        Row("a replica is killed", ("RedisReplicaMissing",), kill_a_replica, {"REDIS_REPLICAS": "1"}),
        Row("the queue is full", ("RequestsShed", *BURNS), fill_the_queue, {"MAX_PENDING": "1"}),
        Row("the service is killed in a loop", ("RestartsInARow",), kill_in_a_loop, instances=2),
        Row("a background task fails", ("BackgroundTaskFails",), let_the_task_fail, command=FAILING_TASK),
        Row("the service is gone", ("NotScraped",), kill_for_good),
        Row("the service is restarted", (), restart_one_by_one, instances=2),
        Row("the service is scaled out", (), scale_out),
        Row("the password is rotated", (), rotate_the_password),
    ]


def selectors() -> set[str]:
    """Return what the rules select: each metric, with its labels. The rules about the cluster's own metrics are left out."""
    found = set()
    for group in shortened_rules(FACTOR)["groups"]:
        if group["name"] != "cluster":
            for rule in group["rules"]:
                expression = re.sub(r"\b(by|on|group_left)\b( \([\w, ]+\))?|\s+", " ", rule["expr"])
                found |= {
                    it[0] for it in re.finditer(r"[a-z_]+(?::\w+)*(?<![\d.])\{[^}]*\}|\b[a-z]+[_:][\w:]+\b(?![({])", expression)
                }
    return found


async def test_each_fault_fires_exactly_its_alerts(tmp_path: Path) -> None:
    rows = table()
    spec = shortened_rules(FACTOR)
    # On a busy machine, many requests take longer than 0.1 s, also without a fault. So here, a request is slow if it takes longer
    # than 0.25 s, and the objectives are lower. A process does not start faster, so the window for restarts is twice as long.
    for rule in (rule for group in spec["groups"] for rule in group["rules"]):
        rule["expr"] = rule["expr"].replace('le="0.1"', 'le="0.25"')
        if rule.get("alert") == "RestartsInARow":
            rule["expr"] = rule["expr"].replace(shortened("15m", FACTOR), shortened("30m", FACTOR))
    for row in rows:
        objective = "0.95" if "LatencyBurnsFast" in row.fires else "0.5"
        own = {"record": "slo:objective", "expr": objective, "labels": {"slo": "latency", "service": row.name}}
        spec["groups"][0]["rules"].append(own)

    async with contextlib.AsyncExitStack() as stack:
        spawn = stack.enter_context(spawning("hitcounter"))
        for number, row in enumerate(rows):
            await row.start(tmp_path / str(number), stack, spawn)
        clients = [
            asyncio.create_task(row.send(number))
            for row in rows
            for number in range(MOST_CLIENTS if row.fault is fill_the_queue else row.clients)
        ]
        stack.callback(lambda: [client.cancel() for client in clients])
        alertmanager = stack.enter_context(Alertmanager(tmp_path))

        def targets() -> dict[int, dict[str, str]]:
            return {target: {"service": row.name, "namespace": "n"} for row in rows for target in row.targets}

        interval = shortened("15s", FACTOR)
        prometheus = stack.enter_context(Prometheus(tmp_path, targets(), spec, interval=interval, alertmanager=alertmanager.port))
        await eventually(lambda: len(prometheus.query("up == 1")) == len(targets()), 20 * SLACK)
        await asyncio.sleep(WARM_UP)

        began = time.time()
        faults = [asyncio.create_task(row.fault(row)) for row in rows]
        await asyncio.sleep(WARM_UP)
        prometheus.scrape(targets())
        notified: dict[tuple[str, str], Any] = {}
        while time.time() < began + LASTS:  # Alertmanager forgets an alert that has resolved.
            for it in await asyncio.to_thread(alertmanager.ask, "v2/alerts"):
                notified[it["labels"]["service"], it["labels"]["alertname"]] = it
            await asyncio.sleep(1)
        lasted = time.time() - began + WARM_UP
        fired: dict[tuple[str, str], float] = {}
        for series in await asyncio.to_thread(prometheus.range, 'ALERTS{alertstate="firing"}', lasted, 0.5):
            pair = series["metric"]["service"], series["metric"]["alertname"]
            fired[pair] = min(float(series["values"][0][0]) - began, fired.get(pair, 1e9))
        unknown = [it for it in selectors() if not await asyncio.to_thread(prometheus.range, it, lasted)]
        for row in rows:
            row.lasts = False
        await asyncio.gather(*faults)

    for row in rows:
        cells = [f"{name} after {seconds:.1f} s" for (service, name), seconds in fired.items() if service == row.name]
        print(f"{row.name}: {', '.join(sorted(cells)) or 'no alert'}")
    print(f"With the durations of production, each second stands for {FACTOR} s.")
    assert not unknown, "the rules select what no service exposes"
    assert set(fired) == {(row.name, name) for row in rows for name in row.fires}
    assert {name for _, name in fired} == alerts().keys() - {"RedisVolumeFills"}
    late = {pair: seconds for pair, seconds in fired.items() if not 0 < seconds < PROMISED[pair[1]] * 60 / FACTOR + OWN * SLACK}
    assert not late
    assert set(notified) == set(fired)
    assert not [text for it in notified.values() for text in it["annotations"].values() if "error" in text]
