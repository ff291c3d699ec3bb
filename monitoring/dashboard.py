"""The Grafana dashboard of every service, as code.

Usage: python monitoring/dashboard.py FILE, which writes the dashboard to FILE as JSON.

The first row answers whether the service is well; the rows below show the causes. A panel has a question as its title. To add a
panel, add a line to `ROWS`. `tests/monitoring/test_dashboard.py` asks a real Prometheus every query.
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as grafana
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import GraphThresholdsStyleMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardLinkType,
    DataSourceRef,
    DataTransformerConfig,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

RUNBOOK = "https://github.com/OWNER/hitcounter/blob/main/docs/operations.md"
SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")

# Labels of the chosen service's series: of the rules' series, of its pods' series, and of the routes that users call.
SLO = 'namespace=~"$namespace",service="$service"'
S = f'job="nanoservice",{SLO}'
USERS = f'{S},route!~"/livez|/readyz|/version|/openapi.json"'
R = "$__rate_interval"

VARIABLES = {
    "namespace": 'label_values(up{job="nanoservice"}, namespace)',
    "service": 'label_values(up{job="nanoservice",namespace=~"$namespace"}, service)',
}


@dataclass(frozen=True)
class Panel:
    """A question, its unit in Grafana, and the queries that answer it: a dict from legend to query."""

    title: str
    unit: str
    description: str
    queries: dict[str, str]
    steps: tuple[tuple[float | None, str], ...] = ((None, "green"),)  # from each value on, the colour
    kind: type = timeseries.Panel
    width: int = 6


def quantiles(metric: str, labels: str, *shares: float, by: str = "") -> dict[str, str]:
    """Return the queries for quantiles of a histogram."""
    rate = f"sum by (le{by and ', ' + by}) (rate({metric}_bucket{{{labels}}}[{R}]))"
    return {f"p{share * 100:g}{by and ' {{' + by + '}}'}": f"histogram_quantile({share}, {rate})" for share in shares}


def rate(metric: str, by: str, labels: str = S) -> str:
    """Return the query for the events per second, by the label `by`."""
    return f"sum by ({by}) (rate({metric}{{{labels}}}[{R}]))"


def per_pod(metric: str) -> str:
    """Return the query for a gauge of each pod."""
    return f"sum by (pod) ({metric}{{{S}}})"


OBJECTIVE = 0.1  # seconds; for the latency, requests that take longer are bad

ROWS = {
    "Is the service well?": [
        Panel(
            "Is it up?",
            "percentunit",
            "The share of the service's pods that answer Prometheus. Without any pod, the alert NotScraped fires.",
            {"{{namespace}}": f"avg by (namespace) (up{{{S}}})"},
            ((None, "red"), (0.5, "orange"), (1, "green")),
            stat.Panel,
            4,
        ),
        Panel(
            "How fast is it?",
            "s",
            "99 of 100 requests take less than this time. Probes, the version and the API's description are not counted.",
            quantiles("http_request_duration_seconds", USERS, 0.99),
            ((None, "green"), (OBJECTIVE, "orange"), (1, "red")),
            stat.Panel,
            4,
        ),
        Panel(
            "Is the store well?",
            "bool_yes_no",
            "Whether Redis does what every pod asks of it.",
            {"{{namespace}}": f"min by (namespace) (redis_up{{{S}}})"},
            ((None, "red"), (1, "green")),
            stat.Panel,
            4,
        ),
        Panel(
            "How much error budget is left?",
            "percentunit",
            "The share of the bad requests of 30 days that the objective still allows; below zero, the objective is missed.",
            {"{{slo}}": f"1 - service:slo_errors:ratio_rate30d{{{SLO}}} / service:slo_budget:ratio{{{SLO}}}"},
            ((None, "red"), (0, "orange"), (0.25, "green")),
            stat.Panel,
        ),
        Panel(
            "Which alerts fire?",
            "none",
            "The alerts of this service, with their severity: `page` wakes a person, `ticket` waits until the next working day.",
            {"": f'sum by (alertname, severity) (ALERTS{{alertstate="firing",{SLO}}})'},
            ((None, "red"),),
            table.Panel,
        ),
    ],
    "What do users get?": [
        Panel(
            "How many requests arrive?",
            "reqps",
            "Answered requests by route, without probes.",
            {"{{method}} {{route}}": rate("http_request_duration_seconds_count", "method, route", USERS)},
        ),
        Panel(
            "Which errors do users get?",
            "reqps",
            "Answers that are errors, by status. The 5xx use up the error budget.",
            {"{{status}}": rate("http_request_duration_seconds_count", "status", f'{USERS},status=~"[45].."')},
        ),
        Panel(
            "How long do requests take?",
            "s",
            "The median and the slowest requests. The objective is 0.1 s.",
            quantiles("http_request_duration_seconds", USERS, 0.5, 0.9, 0.99),
            ((None, "green"), (OBJECTIVE, "red")),
        ),
        Panel(
            "How fast is the error budget used up?",
            "none",
            "1 uses up the budget in exactly 30 days. Above 14.4 for an hour, the alert of the objective pages.",
            {
                "{{slo}}, 5 minutes": f"service:slo_errors:ratio_rate5m{{{SLO}}} / service:slo_budget:ratio{{{SLO}}}",
                "{{slo}}, 1 hour": f"service:slo_errors:ratio_rate1h{{{SLO}}} / service:slo_budget:ratio{{{SLO}}}",
            },
            ((None, "green"), (14.4, "red")),
        ),
        Panel(
            "Are connections refused or closed?",
            "cps",
            "Connections that were refused, and connections that were closed to make room.",
            {
                "{{port}}: refused": rate("http_connections_refused_total", "port"),
                "{{port}}: closed, {{reason}}": rate("http_connections_evicted_total", "port, reason"),
            },
        ),
        Panel(
            "Which version runs?",
            "none",
            "The number of pods with each version. There are two versions during a rolling update only.",
            {"{{version}}": f"count by (version) (build_info{{{S}}})"},
        ),
    ],
    "Is it the store?": [
        Panel("Can each pod use Redis?", "bool_yes_no", "No while Redis fails.", {"{{pod}}": per_pod("redis_up")}),
        Panel(
            "Why does Redis fail?",
            "ops",
            "Failed attempts by cause, in the words of the log and of a 503's `detail`.",
            {"{{cause}}": rate("redis_failures_total", "cause") + " > 0"},
        ),
        Panel(
            "How many replicas have the last write?",
            "none",
            "With REDIS_REPLICAS: the replicas that had the last write in time, and how many there should be.",
            {
                "have it": f"min by (namespace) (redis_replicas{{{S}}})",
                "expected": f"max by (namespace) (redis_replicas_expected{{{S}}})",
            },
        ),
        Panel(
            "Did another server become the primary?",
            "none",
            "With REDIS_SENTINELS: the failovers that each pod has seen.",
            {"{{pod}}": f"sum by (pod) (increase(redis_failovers_total{{{S}}}[{R}]))"},
        ),
        Panel(
            "How long is Redis's certificate valid?",
            "dtdurations",
            "With REDIS_TLS: the time until the certificate of the newest connection expires.",
            {"{{pod}}": f"min by (pod) (redis_certificate_expiry_timestamp_seconds{{{S}}}) - time()"},
            ((None, "red"), (14 * 24 * 3600, "green")),
        ),
    ],
    "Is it the pod?": [
        Panel(
            "Is the CPU the limit?",
            "percentunit",
            "CPU time of each process. A process has one thread, so it can use 100 % of a core.",
            {"{{pod}}": rate("process_cpu_seconds_total", "pod")},
            ((None, "green"), (0.9, "red")),
        ),
        Panel(
            "Does the event loop lag?",
            "s",
            "How late the event loop runs what is due. While it lags, no request makes progress.",
            quantiles("event_loop_lag_seconds", S, 0.99, by="pod"),
            ((None, "green"), (OBJECTIVE, "red")),
        ),
        Panel(
            "How much memory is used?",
            "bytes",
            "Resident memory of each process, and the estimated memory of requests that are not answered yet.",
            {
                "{{pod}}": per_pod("process_resident_memory_bytes"),
                "{{pod}}: held by requests": per_pod("http_held_bytes"),
            },
        ),
        Panel(
            "How many connections are open?",
            "none",
            "Open connections of all pods. Each pod has MAX_CONNECTIONS at most.",
            {"{{port}}": f"sum by (port) (http_connections{{{S}}})"},
        ),
        Panel(
            "How many files are open?",
            "percentunit",
            "The share of the file descriptors that each process may have.",
            {"{{pod}}": f"max by (pod) (process_open_fds{{{S}}} / process_max_fds{{{S}}})"},
            ((None, "green"), (0.9, "red")),
        ),
        Panel(
            "How long has each pod run?",
            "dtdurations",
            "The time since each process started. A saw-tooth is a process that restarts again and again.",
            {"{{pod}}": f"time() - max by (pod) (process_start_time_seconds{{{S}}})"},
        ),
        Panel(
            "Do background tasks fail?",
            "ops",
            "Failures of each background task, if the service has any. A task that has failed is started again.",
            {"{{task}}": rate("background_task_failures_total", "task")},
        ),
        Panel(
            "Are log lines lost?",
            "none",
            "Log lines that could not be written because nobody read the log.",
            {"{{pod}}": f"sum by (pod) (increase(log_lines_dropped_total{{{S}}}[{R}]))"},
        ),
    ],
    # hitcounter: begin
    "Counting (hitcounter only)": [
        Panel(
            "How many requests wait for their number?",
            "none",
            "At the limit, MAX_PENDING, the service answers 503 to further requests at once.",
            {"{{pod}}": per_pod("counter_pending"), "limit": f"max by (service) (counter_max_pending{{{S}}})"},
        ),
        Panel(
            "Which requests were not counted?",
            "reqps",
            "Requests that got 503: at once because too many waited, or after REQUEST_TIMEOUT.",
            {"too many waited": rate("counter_shed_total", "service"), "late": rate("counter_timeouts_total", "service")},
        ),
        Panel(
            "How long does Redis take for a batch?",
            "s",
            "The round trip of a batch. If it rises while the CPU is idle, Redis or its disk is the limit.",
            quantiles("counter_round_trip_seconds", S, 0.5, 0.99),
        ),
        Panel(
            "How many requests share a batch?",
            "none",
            "The mean size of a batch.",
            {"mean": f"{rate('counter_batch_size_sum', 'service')} / {rate('counter_batch_size_count', 'service')}"},
        ),
        Panel(
            "What does the script say of the batches?",
            "ops",
            "The verdicts: counted; late, if a newer batch came first; unknown, if Redis forgot the lane; failed.",
            {"{{verdict}}": rate("counter_replies_total", "verdict")},
        ),
        Panel(
            "Were counts lost?",
            "none",
            "How often Redis came back with lower counts, and batches that may have been counted although they got 503.",
            {
                "counts went back": f"sum(increase(counter_rewinds_total{{{S}}}[{R}]))",
                "batches lost": f"sum(increase(counter_lost_batches_total{{{S}}}[{R}]))",
            },
        ),
        Panel(
            "Do clients repeat POSTs?",
            "reqps",
            "POSTs that got the numbers that their Idempotency-Key had got before.",
            {"repeated": rate("counter_keys_replayed_total", "service")},
        ),
    ],
    # hitcounter: end
}


def built(panel: Panel) -> timeseries.Panel:
    """Return the panel for Grafana."""
    steps = [Threshold(value=value, color=colour) for value, colour in panel.steps]
    it = panel.kind().title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE)
    it = it.span(panel.width).height(7 if panel.kind is timeseries.Panel else 5)
    it = it.thresholds(grafana.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
    if panel.kind is stat.Panel:
        it = it.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    if panel.kind is timeseries.Panel:
        it = it.min(0)
        if len(steps) > 1:
            it = it.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED))
    if panel.kind is table.Panel:
        hidden = {"excludeByName": {"Time": True, "Value": True}}
        it = it.no_value("none").with_transformation(DataTransformerConfig(id_val="organize", options=hidden))
    for number, (legend, query) in enumerate(panel.queries.items()):
        target = prometheus.Dataquery().ref_id("ABC"[number]).datasource(SOURCE).expr(query).legend_format(legend)
        it = it.with_target(target.format(PromQueryFormat.TABLE).instant() if panel.kind is table.Panel else target)
    return it


def main() -> None:
    """Write the dashboard to the file that the argument names."""
    link = grafana.DashboardLink("What to do").type(DashboardLinkType.LINK).url(RUNBOOK).target_blank(True)
    board = (
        grafana.Dashboard("Services").uid("nanoservices").tags(["nanoservice"]).readonly().refresh("30s").time("now-3h", "now")
    )
    board = board.link(link).with_variable(grafana.DatasourceVariable("datasource").type("prometheus"))
    for name, query in VARIABLES.items():
        variable = grafana.QueryVariable(name).datasource(SOURCE).query(query).refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        board = board.with_variable(variable.include_all(True).all_value(".*") if name == "namespace" else variable)
    numbers = itertools.count(1)  # Grafana's links to a panel have its number
    for title, panels in ROWS.items():
        board = board.with_row(grafana.Row(title).id(next(numbers)))
        for panel in panels:
            board = board.with_panel(built(panel).id(next(numbers)))
    Path(sys.argv[1]).write_text(json.dumps(board.build(), cls=JSONEncoder, sort_keys=True, indent=1) + "\n")


if __name__ == "__main__":
    main()
