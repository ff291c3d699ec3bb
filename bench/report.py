"""Write the results of the benchmark: results.md and results.svg."""

import os
import platform
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib import metadata
from pathlib import Path
from statistics import median, quantiles

SERVICE = "hitcounter"
EVERYSEC, DICT, BEFORE = f"{SERVICE}, appendfsync everysec", f"{SERVICE}, a dict for Redis", f"{SERVICE}, before"
FLASK, FASTAPI, AIOHTTP, GO, NGINX, WEBDIS = (
    "Flask, gunicorn (starting code)",
    "FastAPI, uvicorn, redis-py",
    "aiohttp, redis-py",
    "Go net/http, go-redis",
    "nginx, Lua",
    "webdis",
)

WINDOW_BEGINS, WINDOW_ENDS = 0.3, 0.95  # seconds after wrk's start

Figures = dict[str, float]  # some figures of one server


@dataclass
class Results:
    """All figures of a run."""

    windows: dict[tuple[str, int], list[Figures]] = field(default_factory=dict)  # by server and number of connections
    rounds: dict[str, list[Figures]] = field(default_factory=dict)  # by server, when it runs alone

    @property
    def connections(self) -> list[int]:
        """Return the numbers of connections, in ascending order."""
        return sorted({number for _, number in self.windows})


_COLUMNS = (
    ("Redis commands/request", "commands", "{:.3f}"),
    ("p50 ms", "p50", "{:.2f}"),
    ("p99 ms", "p99", "{:.2f}"),
    ("at requests/s", "half", "{:,.0f}"),
    ("duplicates", "duplicates", "{:.2%}"),
    ("Pss MB", "pss", "{:.1f}"),
    ("Pss MB after 1,000", "pss_1000", "{:.1f}"),
    ("start-up s", "start", "{:.2f}"),
)

_ABOUT = """\
wrk sends the load: a closed loop over keep-alive connections, on another core than the servers.
Redis runs on the core of wrk.
It is Valkey with `appendonly yes`, and with `appendfsync always` unless the server's name says otherwise.
All traffic is on loopback.

All {names} servers run at the same time on one core, and wrk loads one of them after the other for a window of {window:g} s.
There are {windows} windows for each server and each number of connections.
The ratio of two servers is computed within each round of windows, where both saw the same machine.
A ratio is shown as the median of these ratios, with their 10th and 90th percentile.

- CPU is the processor time of the server's threads, from `/proc/PID/task/*/schedstat`, for each request.
- The number of requests in a window is the difference between the counts in Redis at its beginning and its end.
  With a dict for Redis, it is the difference between the numbers in two answers.
- errors are wrk's socket errors and answers other than 200.

Each server also runs alone, in {rounds} rounds, whose medians are shown.

- duplicates are answers whose number was already in an earlier answer.
- Redis commands are calls from `INFO commandstats`.
  A script call counts as one command; the commands that `count.lua` itself calls are left out.
- p50 and p99 are latencies in an open loop over 64 connections, at half the requests/s of the closed loop.
  The latency of a request begins when the request is due, so it includes waiting for a connection or for slow earlier requests.
- Pss is the memory of the process tree, from `/proc/PID/smaps_rollup`, after 64 and after 1,000 connections.
  Memory that a server shares with other running processes counts only in part.
- start-up is the time from the process's start to its first 200, while Redis runs.

The peers (`bench/peers/`) are set up as their documentation recommends.
Their access logs are off.
gunicorn has one worker with 16 threads, uvicorn has uvloop and httptools, and aiohttp runs on asyncio's own loop.
nginx has one worker and a pool of 1,000 connections to Redis, and webdis has one thread; both are Debian's packages.
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


def ratios(results: Results, over: str, under: str, connections: int, figure: str = "cpu") -> list[float]:
    """Return the ratio of two servers' figures in each round of windows, or nothing if one of them was not measured."""
    pairs = zip(results.windows.get((over, connections), []), results.windows.get((under, connections), []), strict=False)
    return [a[figure] / b[figure] for a, b in pairs if figure in a and figure in b]


def targets(results: Results) -> list[Target]:
    """Return the targets, each with its measured figure."""

    def ratio(over: str, under: str, connections: int = 64, figure: str = "cpu") -> float | None:
        found = ratios(results, over, under, connections, figure)
        return median(found) if found else None

    def own(figure: str, name: str = SERVICE) -> float | None:
        found = [figures[figure] for figures in results.rounds.get(name, []) if figure in figures]
        return median(found) if found else None

    after, before = own("p50_open"), own("p50_open", BEFORE)
    cpu = "CPU per request"
    return [
        Target(f"{cpu} of the starting code, divided by the service's", ratio(FLASK, SERVICE), 14, at_least=True),
        Target(f"{cpu} of FastAPI, divided by the service's", ratio(FASTAPI, SERVICE), 7.5, at_least=True),
        Target(f"{cpu} of the service, divided by Go's", ratio(SERVICE, GO), 0.65),
        Target(f"{cpu} of the service, divided by Go's, at 1,000 connections", ratio(SERVICE, GO, 1000), 0.55),
        Target(f"{cpu} of the service, divided by that of nginx with Lua", ratio(SERVICE, NGINX), 1),
        Target(f"{cpu} of the service, divided by that of webdis", ratio(SERVICE, WEBDIS), 1),
        Target(f"{cpu} of the service, divided by its own with a dict", ratio(SERVICE, DICT), 1.6),
        Target("Redis commands per request", own("commands"), 0.1),
        Target("errors at 1,000 connections", sum(figures["failed"] for figures in results.windows[SERVICE, 1000]), 0),
        Target("throughput with `appendfsync always`, by that with `everysec`", ratio(SERVICE, EVERYSEC, 64, "rate"), 0.9, True),
        Target("p50 at 16,000 requests/s, divided by that before", after / before if after and before else None, 0.5),
        Target("Pss in MB", own("pss"), 42),
        Target("Pss in MB after 1,000 connections", own("pss_1000"), 45),
    ]


def tables(results: Results) -> str:
    """Return all figures as Markdown tables."""
    names, numbers = list(results.rounds), results.connections
    titles = ["server", *(f"{number:,}" for number in numbers)]

    def by_connections(title: str, figure: str, form: str) -> str:
        rows = [[name, *(_format(form, results.windows[name, number], figure) for number in numbers)] for name in names]
        return f"## {title}, by connections\n\n{_rows(titles, rows)}"

    compared = [
        [name, *(_spread(ratios(results, name, SERVICE, number)) for number in numbers)] for name in names if name != SERVICE
    ]
    alone = []
    for name, measured in results.rounds.items():
        alone.append([name, *(_format(form, measured, key) for _, key, form in _COLUMNS)])
    return "\n\n".join(
        [
            by_connections("CPU µs per request", "cpu", "{:.1f}"),
            f"## CPU per request, divided by the service's\n\n{_rows(titles, compared)}",
            by_connections("Requests per second", "rate", "{:,.0f}"),
            by_connections("Errors", "errors", "{:.2%}"),
            "## Each server alone\n\n" + _rows(["server", *(title for title, _, _ in _COLUMNS)], alone),
            f"## Targets\n\nWithout another number, a figure is at 64 connections.\n\n{target_table(results)}",
        ]
    )


def target_table(results: Results) -> str:
    """Return the targets as a Markdown table."""
    return "\n".join(["| target | | measured | |", "| --- | --- | --- | --- |", *map(str, targets(results))])


def machine(versions: dict[str, str]) -> str:
    """Return a text that names the machine, and the versions of everything that takes part in a run."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("aiohttp", "redis", "hiredis", "uvloop", "flask", "gunicorn", "fastapi", "uvicorn", "httptools")
    versions = {"Python": platform.python_version(), **{name: metadata.version(name) for name in packages}, **versions}
    named = ", ".join(f"{name} {number}" for name, number in versions.items())
    built = f"Python's build: {platform.python_implementation()} {sys.version}"
    hardware = f"Machine: {model}, {os.cpu_count()} cores, {platform.system()} {platform.release()}."
    return f"{hardware}\n{built}.\n" + textwrap.fill(f"Versions: {named}.", 130, break_on_hyphens=False)


def markdown(results: Results, conditions: str, profile: str) -> str:
    """Return the text of results.md."""
    about = _ABOUT.format(
        names=len(results.rounds),
        window=WINDOW_ENDS - WINDOW_BEGINS,
        windows=len(next(iter(results.windows.values()))),
        rounds=len(results.rounds[SERVICE]),
    )
    return f"""\
# The last run of `make bench`

<!-- Written by bench/run.py; do not edit. -->

![CPU per request and requests per second of each server](results.svg)

{tables(results)}

## How it was measured

{about}
{conditions}

## Where the service's time goes

The table lists the service's functions by their own time, under cProfile with 64 connections.
cProfile makes functions in Python look more expensive than functions in C.

{profile}
"""


def svg(results: Results) -> str:
    """Return the picture, which has a panel of bars for each main figure and is readable on light and dark backgrounds."""
    panels = (("CPU per request at 64 connections, µs (less is better)", "cpu"), ("requests per second (more is better)", "rate"))
    windows = {name: results.windows[name, 64] for name in results.rounds}
    parts, top = [], 24
    for title, key in panels:
        parts.append(f'<text class="title" x="0" y="{top}">{escape(title)}</text>')
        most = max(_median(measured, key) for measured in windows.values())
        for name, measured in windows.items():
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


def _format(form: str, measured: list[Figures], key: str) -> str:
    """Return the median of a figure as a text, or a dash if the figure was not measured."""
    found = [figures for figures in measured if key in figures]
    return form.format(_median(found, key)) if found else "-"


def _spread(values: Sequence[float]) -> str:
    """Return the median of some ratios, with their 10th and 90th percentile if there are enough."""
    if len(values) < 2:
        return "".join(f"{value:.2f}" for value in values) or "-"
    cuts = quantiles(values, n=10, method="inclusive")
    return f"{median(values):.2f} ({cuts[0]:.2f} to {cuts[8]:.2f})"


def _rows(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, ["---"] * len(titles), *rows))
