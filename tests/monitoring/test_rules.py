"""Each alert fires on series that should fire it, is silent on their nearest harmless neighbour, and resolves (`promtool`)."""

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.prometheus import alerts, program, rules

pytestmark = pytest.mark.monitoring

TARGET = 'job="nanoservice",namespace="s",service="s"'
CAUSE = 'cause="it is out of memory (OOM)"'
BEFORE = 360  # minutes before the fault of a test about the error budget
Series = dict[str, str]  # each series with its values, one for each minute, in promtool's notation


def series(name: str, values: str, labels: str = "", pod: str = "a") -> Series:
    return {f"{name}{{{TARGET},pod={pod!r}{',' if labels else ''}{labels}}}".replace("'", '"'): values}


def requests(good: str, bad: str = "0x9999", slow: str = "0x9999", route: str = "/", pod: str = "a") -> Series:
    """Return the series of requests; each of the three counts has its values. Those of `good` and `slow` have the status 200."""
    name, ok = "http_request_duration_seconds", f'route="{route}",status="200"'
    return {
        **series(f"{name}_bucket", good, f'{ok},method="GET",le="0.1"', pod),
        **series(f"{name}_count", good, f'{ok},method="GET"', pod),
        **series(f"{name}_bucket", "0x9999", f'{ok},method="POST",le="0.1"', pod),
        **series(f"{name}_count", slow, f'{ok},method="POST"', pod),
        **series(f"{name}_bucket", bad, f'route="{route}",status="503",method="GET",le="0.1"', pod),
        **series(f"{name}_count", bad, f'route="{route}",status="503",method="GET"', pod),
    }


def rates(*parts: tuple[int, int]) -> str:
    """Return the values of a counter that grows by a number in each minute; each part is that number, and its minutes."""
    values, total = ["0"], 0
    for growth, minutes in parts:
        values.append(f"{total + growth}+{growth}x{minutes - 1}")
        total += growth * minutes
    return " ".join(values)


@dataclass
class Case:
    """The series of an alert, the minutes at which it must begin to fire and must have resolved, and its harmless neighbours."""

    fault: Series
    fires: int
    resolved: int
    harmless: dict[str, Series]
    later: tuple[str, ...] = ()  # the alerts that still fire at `resolved`


def burn(fast: bool, slo: str) -> Case:
    """Return the case of an alert about the error budget."""
    kind, budget = {"availability": ("bad", 0.001), "latency": ("slow", 0.01)}[slo]

    def burning(rate: float, minutes: int) -> Series:
        """Return requests whose share of bad ones is `rate` times the budget for some minutes, after six hours without any."""
        bad = round(6000 * budget * rate)
        good = rates((6000, BEFORE), (6000 - bad, minutes), (6000, BEFORE))
        return requests(good, **{kind: rates((0, BEFORE), (bad, minutes), (0, BEFORE))})

    good = rates((6000, BEFORE))
    harmless = {
        "a rolling update": {
            **requests(f"{good} _x99", pod="a"),
            **requests(f"_x{BEFORE} " + rates((6000, 99)), pod="b"),
        },
        "a restart of Redis within 5 s": requests(
            rates((6000, BEFORE), (5500, 1), (6000, 60)), **{kind: rates((0, BEFORE), (500, 1), (0, 60))}
        ),
        "an idle night": requests(rates((6000, 60), (0, 480), (6000, 60))),
        "a single bad request at night": requests(rates((0, BEFORE)), **{kind: rates((0, 300), (1, 1), (0, 60))}),
        "probes that fail": {
            **requests(good),
            **requests("0x999", route="/readyz", **{kind: good}),
        },
    }
    if fast:
        bad = round(6000 * budget * 20)
        harmless["a burst of the first bad requests"] = requests(
            rates((6000, BEFORE), (6000 - bad, 10), (6000, 60)), **{kind: f"_x{BEFORE} 0 {bad}+{bad}x9 {10 * bad}x60"}
        )
        return Case(burning(55, 25), BEFORE + 19, BEFORE + 45, harmless, (f"{slo.capitalize()}BurnsSlowly",))
    harmless["a share within the objective"] = burning(0.8, 180)
    return Case(burning(5.5, 120), BEFORE + 97, BEFORE + 310, harmless)


CASES = {
    "AvailabilityBurnsFast": burn(True, "availability"),
    "AvailabilityBurnsSlowly": burn(False, "availability"),
    "LatencyBurnsFast": burn(True, "latency"),
    "LatencyBurnsSlowly": burn(False, "latency"),
    "RedisUnusable": Case(
        {**series("redis_up", "1x99"), **series("redis_up", "1x5 0x9 1x30", pod="b")}, 7, 16,
        {"a restart of Redis between two scrapes of each instance": series("redis_up", "1x5 0 1x30")},
    ),
    "RedisIsFull": Case(
        series("redis_failures_total", "0x5 1x30", CAUSE), 7, 15,
        {"a failure of another cause": series("redis_failures_total", "0x5 1+1x30", 'cause="it cannot be reached"')},
    ),
    # hitcounter: begin
    "CountsLost": Case(
        series("counter_rewinds_total", "0x5 1x99"), 6, 70,
        {"a restart of the service": series("counter_rewinds_total", "1x5 0x99")},
    ),
    # hitcounter: end
    "RedisReplicaMissing": Case(
        {**series("redis_replicas_expected", "2x99"), **series("redis_replicas", "2x5 1x20 2x20")}, 11, 27,
        {"a replica that restarts": {**series("redis_replicas_expected", "2x99"), **series("redis_replicas", "2x5 1x3 2x20")}},
    ),
    "RedisCertificateExpires": Case(
        series("redis_certificate_expiry_timestamp_seconds", f"{14 * 86400 + 300}x30 {90 * 86400}x30"), 16, 31,
        {
            "a certificate of more than 14 days": series("redis_certificate_expiry_timestamp_seconds", f"{15 * 86400}x60"),
        },
    ),
    "RestartsInARow": Case(
        series("process_start_time_seconds", "1x5 2x2 3x2 4x60"), 13, 30,
        {
            "a rolling update of three pods": {
                **series("process_start_time_seconds", "1x5"),
                **series("process_start_time_seconds", "_x4 2x30", pod="b"),
                **series("process_start_time_seconds", "_x6 3x30", pod="c"),
            },
            "restarts that are rare": series("process_start_time_seconds", "1x9 2x9 3x9 4x9"),
        },
    ),
    "BackgroundTaskFails": Case(
        series("background_task_failures_total", "0x5 1+1x20 21x40", 'task="t"'), 14, 45,
        {
            "a single failure": series("background_task_failures_total", "0x5 1x60", 'task="t"'),
            "a short outage of Redis": {
                **series("background_task_failures_total", "0x5 3x60", 'task="t"'),
                **series("redis_up", "1x5 0 1x60"),
            },
        },
    ),
    # hitcounter: begin
    "RequestsShed": Case(
        series("counter_shed_total", rates((0, 5), (60, 20), (0, 20))), 11, 30,
        {"a burst": series("counter_shed_total", rates((0, 5), (600, 2), (0, 20)))},
    ),
    # hitcounter: end
    "NotScraped": Case(
        series("up", "1x5 0x30 1x30"), 11, 37,
        {
            "a slow scrape": series("up", "1x5 0 1x30"),
            "an instance that is gone": {**series("up", "1x60"), **series("up", "1x5 0x30", pod="b")},
        },
    ),
    "RedisVolumeFills": Case(
        {
            'kubelet_volume_stats_available_bytes{namespace="s",persistentvolumeclaim="data-redis-0"}': "50x5 20x30 50x30",
            'kubelet_volume_stats_capacity_bytes{namespace="s",persistentvolumeclaim="data-redis-0"}': "100x99",
        },
        21, 37,
        {
            "another volume": {
                'kubelet_volume_stats_available_bytes{namespace="s",persistentvolumeclaim="other"}': "20x99",
                'kubelet_volume_stats_capacity_bytes{namespace="s",persistentvolumeclaim="other"}': "100x99",
            }
        },
    ),
}  # fmt: skip


def run(folder: Path, tests: list[dict[str, Any]], spec: Any = None) -> str:
    """Run unit tests with promtool, and return what failed."""
    (folder / "rules.yaml").write_text(yaml.safe_dump(spec or rules()))
    (folder / "tests.yaml").write_text(
        yaml.safe_dump({"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": tests})
    )
    command = [program("promtool"), "test", "rules", str(folder / "tests.yaml")]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return result.stdout if result.returncode else ""


def expect(minute: int, *firing: str, within: str = "") -> dict[str, Any]:
    """Return the check that exactly these alerts fire at `minute`, or at any minute of the range `within` before it.

    Each one is written as `ALERT of SERVICE`.
    """
    alerts = f'last_over_time(ALERTS{{alertstate="firing"}}[{within}])' if within else 'ALERTS{alertstate="firing"}'
    named = [it.split(" of ") for it in firing]
    labels = [f'{{alertname="{alert}"{service and f",namespace={service!r}"}}}'.replace("'", '"') for alert, service in named]
    samples = [{"labels": them, "value": 1} for them in labels]
    return {"eval_time": f"{minute}m", "expr": f"group by (alertname, namespace) ({alerts})", "exp_samples": samples}


def unit_test(name: str, services: dict[str, Series], *checks: dict[str, Any]) -> dict[str, Any]:
    """Return a unit test of promtool in which each service has its series. A service whose `up` is not among them is scraped."""
    inputs = []
    for service, given in services.items():
        for key, values in (given if any(key.startswith("up{") for key in given) else {**given, **series("up", "1x999")}).items():
            inputs.append({"series": key.replace('"s"', f'"{service}"'), "values": values})
    return {"name": name, "interval": "1m", "input_series": inputs, "promql_expr_test": list(checks)}


def test_every_alert_has_a_case() -> None:
    assert set(CASES) == set(alerts())


@pytest.mark.parametrize("name", CASES)
def test_alert_fires_is_silent_and_resolves(name: str, tmp_path: Path) -> None:
    """The fault and its harmless neighbours are services of the same Prometheus."""
    case = CASES[name]
    checks = [expect(case.fires - 2), expect(case.fires, f"{name} of fault")]
    checks.append(expect(case.resolved, *(f"{alert} of fault" for alert in case.later)))
    checks.append(expect(case.resolved, *(f"{alert} of fault" for alert in (name, *case.later)), within="12h"))
    failed = run(tmp_path, [unit_test(name, {"fault": case.fault, **case.harmless}, *checks)])
    assert not failed, failed


def test_service_without_any_target_and_prometheus_without_any_service_are_not_scraped(tmp_path: Path) -> None:
    services = {"gone": series("up", "1x5"), "other": series("up", "1x99")}
    gone = unit_test("gone", services, expect(20, "NotScraped of gone"), expect(80))
    never = unit_test("never", {"other": {'up{job="another"}': "1x99"}}, expect(4), expect(5, "NotScraped of "))
    failed = run(tmp_path, [gone, never])
    assert not failed, failed


def test_objective_of_one_service_is_one_line(tmp_path: Path) -> None:
    spec = rules()
    spec["groups"][0]["rules"].append(
        {"record": "slo:objective", "expr": "0.98", "labels": {"slo": "availability", "service": "own"}}
    )
    services = dict.fromkeys(("own", "other"), requests(rates((594, 60)), bad=rates((6, 60))))
    expected = expect(59, "AvailabilityBurnsFast of other", "AvailabilityBurnsSlowly of other")
    failed = run(tmp_path, [unit_test("own", services, expected)], spec)
    assert not failed, failed


def test_every_alert_has_a_severity_and_a_duration() -> None:
    for name, rule in alerts().items():
        assert rule["labels"]["severity"] in ("page", "ticket"), name
        assert rule["for"], name
