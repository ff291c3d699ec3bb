"""Write the results of the benchmark: results.md and results.svg."""

import os
import platform
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import median

SERVICE = "hitcounter"
EVERYSEC, DICT = f"{SERVICE}, appendfsync everysec", f"{SERVICE}, a dict for Redis"
FLASK, FASTAPI, AIOHTTP, GO = (
    "Flask, gunicorn (starting code)",
    "FastAPI, uvicorn, redis-py",
    "aiohttp, redis-py",
    "Go net/http, go-redis",
)

Figures = dict[str, float]  # the figures of one server in one round
Rounds = dict[str, list[Figures]]  # for each server, its figures in each round

_COLUMNS = (
    ("requests/s", "rate", "{:,.0f}"),
    ("CPU µs/request", "cpu", "{:.1f}"),
    ("Redis commands/request", "commands", "{:.3f}"),
    ("p50 ms", "p50", "{:.2f}"),
    ("p99 ms", "p99", "{:.2f}"),
    ("at requests/s", "half", "{:,.0f}"),
    ("errors at 256", "errors_256", "{:.2%}"),
    ("errors at 1,000", "errors_1000", "{:.2%}"),
    ("duplicates", "duplicates", "{:.2%}"),
    ("Pss MB", "pss", "{:.1f}"),
    ("Pss MB after 1,000", "pss_1000", "{:.1f}"),
    ("start-up s", "start", "{:.2f}"),
)

_ABOUT = """\
The figures are medians of {rounds} interleaved rounds of {names} servers; each round starts each server again.
The server runs alone on one core; the load and Redis run on another core.
Redis is Valkey with `appendonly yes`, and with `appendfsync always` unless the server's name says otherwise.
All traffic is on loopback.
A target's ratio is computed within each round, and the median of these ratios is compared with the limit.

- requests/s, CPU, commands and duplicates are measured in a closed loop over 64 keep-alive connections.
  After a warm-up, the loop runs for {seconds:g} s in each round.
- CPU is the user and system time of the server's process tree, from `/proc`.
- duplicates are answers whose number was already in an earlier answer.
- Redis commands are calls from `INFO commandstats`.
  A script call counts as one command; the commands that `count.lua` itself calls are left out.
- p50 and p99 are latencies in an open loop at half the requests/s of the same round.
  The latency of a request begins when the request is due, so it includes waiting for a connection or for slow earlier requests.
- errors are the share of requests that were not answered with 200, in a closed loop over 256 and over 1,000 connections.
- Pss is the memory of the process tree, from `/proc/PID/smaps_rollup`, after 64 and after 1,000 connections.
  Memory that a server shares with other running processes counts only in part.
  If the server ran alone, its Pss would be higher.
- start-up is the time from the process's start to its first 200 from `/`, while Redis runs.

The peers (`bench/peers/`) are set up as their documentation recommends.
Their access logs are off.
gunicorn has one worker with 16 threads, uvicorn has uvloop and httptools, and aiohttp runs on asyncio's own loop.
redis-py and go-redis have their default pools.
The pool of redis-py raises an error if more than 100 connections are needed.
This explains most errors of the servers that use redis-py.
"""


@dataclass
class Target:
    """A limit for a measured figure. The limit was set before the measurement."""

    text: str
    value: float | None  # None if the figure was not measured
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Return whether the target was met, or None if the figure was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        verdict = {True: "met", False: "**missed**", None: "not measured"}[self.met]
        measured = "-" if self.value is None else f"{self.value:.3g}"
        return f"| {self.text} | {'at least' if self.at_least else 'at most'} {self.limit:g} | {measured} | {verdict} |"


def targets(rounds: Rounds) -> list[Target]:
    """Return the targets, each with its measured figure."""

    def ratio(figure: str, over: str, under: str) -> float | None:
        if over not in rounds or under not in rounds:
            return None
        return median(a[figure] / b[figure] for a, b in zip(rounds[over], rounds[under], strict=True))

    def own(figure: str) -> list[float]:
        return [figures[figure] for figures in rounds[SERVICE]]

    synced = ratio("rate", SERVICE, EVERYSEC)
    return [
        Target("the starting code's CPU per request, divided by the service's", ratio("cpu", FLASK, SERVICE), 12, at_least=True),
        Target("FastAPI's CPU per request, divided by the service's", ratio("cpu", FASTAPI, SERVICE), 7, at_least=True),
        Target("the service's CPU per request, divided by its CPU per request with a dict", ratio("cpu", SERVICE, DICT), 1.2),
        Target("the service's CPU per request, divided by Go's", ratio("cpu", SERVICE, GO), 1.1),
        Target("Redis commands per request at 64 connections", median(own("commands")), 0.1),
        Target("errors at 1,000 connections, in all rounds", sum(own("failed_1000")), 0),
        Target("throughput with `appendfsync always`, divided by throughput with `everysec`", synced, 0.9, at_least=True),
        Target("Pss in MB at 64 connections", median(own("pss")), 45),
        Target("Pss in MB after 1,000 connections", median(own("pss_1000")), 45),
    ]


def table(rounds: Rounds) -> str:
    """Return the medians as a Markdown table."""
    rows = [["server", *(title for title, _, _ in _COLUMNS)], ["---"] * (len(_COLUMNS) + 1)]
    for name, measured in rounds.items():
        rows.append([name, *(form.format(_median(measured, key)) if key in measured[0] else "-" for _, key, form in _COLUMNS)])
    return _rows(rows)


def target_table(rounds: Rounds) -> str:
    """Return the targets as a Markdown table."""
    return "\n".join(["| target | | measured | |", "| --- | --- | --- | --- |", *map(str, targets(rounds))])


def machine(versions: dict[str, str]) -> str:
    """Return a text that names the machine, and the versions of everything that takes part in a run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("aiohttp", "redis", "hiredis", "uvloop", "flask", "gunicorn", "fastapi", "uvicorn", "httptools")
    versions = {"Python": platform.python_version(), **{name: metadata.version(name) for name in packages}, **versions}
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    hardware = f"Machine: {model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}."
    return f"{hardware}\n" + textwrap.fill(f"Versions: {named}.", 130, break_on_hyphens=False)


def markdown(rounds: Rounds, seconds: float, conditions: str, profile: str) -> str:
    """Return the text of results.md."""
    about = _ABOUT.format(rounds=len(rounds[SERVICE]), names=len(rounds), seconds=seconds)
    return f"""\
# The last run of `make bench`

<!-- Written by bench/run.py; do not edit. -->

![CPU per request and requests per second of each server](results.svg)

{table(rounds)}

## Targets

{target_table(rounds)}

## How it was measured

{about}
{conditions}

## Where the service's time goes

The table lists the service's functions by their own time, under cProfile with 64 connections.
cProfile makes functions in Python look more expensive than functions in C.

{profile}
"""


def svg(rounds: Rounds) -> str:
    """Return the picture, which has a panel of bars for each main figure and is readable on light and dark backgrounds."""
    panels = (("CPU per request, µs (less is better)", "cpu"), ("requests per second (more is better)", "rate"))
    parts, top = [], 24
    for title, key in panels:
        parts.append(f'<text class="title" x="0" y="{top}">{escape(title)}</text>')
        most = max(_median(measured, key) for measured in rounds.values())
        for name, measured in rounds.items():
            top += 24
            value = _median(measured, key)
            width = 400 * value / most
            kind = "own" if name == SERVICE else "peer"
            parts.append(f'<text x="230" y="{top + 4}" text-anchor="end">{escape(name)}</text>')
            parts.append(f'<rect class="{kind}" x="240" y="{top - 9}" width="{width:.1f}" height="17" rx="2"/>')
            parts.append(f'<text x="{246 + width:.1f}" y="{top + 4}">{value:,.0f}</text>')
        top += 44
    style = (
        "text{font:13px system-ui,sans-serif;fill:#24292f}.title{font-weight:600}.own{fill:#0969da}.peer{fill:#8c959f}\n"
        "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.own{fill:#58a6ff}.peer{fill:#6e7681}}"
    )
    size = f'viewBox="0 0 720 {top - 24}" role="img"'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size}>', f"<style>{style}</style>", *parts, "</svg>\n"])


def _median(measured: list[Figures], key: str) -> float:
    return median(figures[key] for figures in measured)


def _rows(rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
