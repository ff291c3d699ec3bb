"""The committed dashboard is the one that its code writes, and a real Prometheus has an answer to each of its queries.

Prometheus has the scrape configuration of docs/monitoring.md.
"""

import asyncio
import json
import os
import re
import subprocess
import textwrap
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoservice.testing.replicated import Replicated
from nanoservice.testing.served import serving
from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, eventually
from tests.nanoservice.second_service import SERVICE as GREETER
from tests.support import ROOT
from tests.support.failing_task import FAILING_TASK
from tests.support.load import Load
from tests.support.process import spawning
from tests.support.prometheus import COMPONENT, Prometheus, program, rules, shortened_rules
from tests.support.tls import TlsFront

DASHBOARD = json.loads((COMPONENT / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
FACTOR = 30  # by which the durations of the rules are shortened, because the run is short


def packages() -> str:
    """Return the Python that has the packages of monitoring/requirements.txt."""
    return os.environ["MONITORING_PYTHON"]


def test_every_panel_has_a_question_a_unit_and_a_description() -> None:
    assert PANELS
    for panel in PANELS:
        assert panel["title"].endswith("?")
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["description"].endswith(".")
    assert len({panel["title"] for panel in PANELS}) == len(PANELS)


def test_every_query_is_for_the_chosen_service() -> None:
    for expression in expressions():
        metrics = expression.count("{")
        assert metrics == expression.count('namespace=~"$namespace",service="$service"') > 0


@pytest.mark.monitoring
def test_dashboard_is_what_its_code_writes(tmp_path: Path) -> None:
    subprocess.run([packages(), ROOT / "monitoring" / "dashboard.py", tmp_path / "new.json"], check=True)
    assert (tmp_path / "new.json").read_text() == (COMPONENT / "dashboard.json").read_text(), "it is stale: run make dashboard"


def expressions() -> list[str]:
    """Return the queries of all panels."""
    return [target["expr"] for panel in PANELS for target in panel["targets"]]


def filled(expression: str, service: str) -> str:
    """Return the query with a value for each of Grafana's variables."""
    for name, value in {"$namespace": "n", "$service": service, "$__rate_interval": "4s"}.items():
        expression = expression.replace(name, value)
    return expression


def documented(key: str) -> Any:
    """Return the example of docs/monitoring.md that begins with `key`."""
    text = (ROOT / "docs" / "monitoring.md").read_text()
    (block,) = re.findall(rf"^ *```yaml\n( *{key}:\n.*?)^ *```$", text, re.MULTILINE | re.DOTALL)
    return yaml.safe_load(textwrap.dedent(block))


def relabelling() -> Any:
    """Return the relabel configurations of the documented scrape configuration."""
    (job,) = documented("scrape_configs")["scrape_configs"]
    return job["relabel_configs"]


def discovered(service: str, pod: str) -> dict[str, str]:
    """Return the labels with which Kubernetes announces the admin port of a service's pod."""
    labels = {"namespace": "n", "pod_name": pod, "pod_phase": "Running", "pod_container_port_name": "admin"}
    labels |= {"pod_label_app_kubernetes_io_component": "service", "pod_label_app_kubernetes_io_name": service}
    return {f"__meta_kubernetes_{name}": value for name, value in labels.items()}


@pytest.mark.monitoring
async def test_second_service_has_answers_without_a_line_of_its_own_and_another_objective_with_one(
    valkey: Valkey, tmp_path: Path
) -> None:
    spec = shortened_rules(FACTOR)
    own = {"record": "slo:objective", "expr": "0.995", "labels": {"slo": "availability", "service": "greeter"}}
    (objectives,) = (group["rules"] for group in spec["groups"] if group["name"] == "objectives")
    objectives.append(own)
    first_row = [target["expr"] for panel in PANELS[:4] for target in panel["targets"]]
    async with serving(GREETER, valkey.environ()) as served:
        targets = {served.admin_port: discovered("greeter", "greeter-a")}
        with Prometheus(tmp_path, targets, spec, relabelling()) as prometheus:

            async def answered() -> bool:
                async with served.client.get("/greet/ann") as answer:
                    assert answer.status == 200
                found = [await asyncio.to_thread(prometheus.query, filled(it, "greeter")) for it in first_row]
                return all(found)

            await eventually(answered, 20 * SLACK)
            budgets = await asyncio.to_thread(prometheus.query, "service:slo_budget:ratio")
    assert {it["metric"]["slo"]: round(float(it["value"][1]), 6) for it in budgets} == {"availability": 0.005, "latency": 0.01}


@pytest.mark.monitoring
def test_documented_configurations_are_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    (command,) = re.findall(r"sed .* > nanoservice\.rules\.yaml", text)
    output = tmp_path / "nanoservice.rules.yaml"
    subprocess.run(command.replace("nanoservice.rules.yaml", str(output)), shell=True, check=True, cwd=ROOT)
    assert yaml.safe_load(output.read_text()) == rules()
    (tmp_path / "prometheus.yaml").write_text(yaml.dump({"rule_files": [str(output)], **documented("scrape_configs")}))
    subprocess.run([program("promtool"), "check", "config", tmp_path / "prometheus.yaml"], check=True)
    (tmp_path / "alertmanager.yaml").write_text(yaml.dump(documented("route")))
    subprocess.run([program("amtool"), "check-config", tmp_path / "alertmanager.yaml"], check=True)


# hitcounter: begin


async def faults(store: Replicated, valkey: Valkey) -> None:
    """Break Redis in several ways while the load runs."""
    await asyncio.sleep(8)
    valkey.freeze()
    await asyncio.sleep(4)
    valkey.thaw()
    await asyncio.sleep(4)
    primary = store.primary()
    assert primary
    await asyncio.to_thread(primary.kill)
    await asyncio.sleep(8)
    await asyncio.to_thread(valkey.run, "SET", "{hitcounter}:hits", "1")
    await asyncio.sleep(6)


async def answers(folder: Path) -> dict[str, list[Any]]:
    """Return the series that answer each query of the dashboard.

    Three instances serve a load while Redis fails in several ways. Two instances have a replicated Redis, and one uses TLS.
    """
    (folder / "valkey").mkdir()
    (folder / "fails").touch()
    valkey = Valkey(folder / "valkey")
    front = TlsFront(valkey, folder)
    async with Replicated(folder / "store").running() as store:
        await asyncio.to_thread(valkey.start)
        await front.start(expires=datetime.now(UTC) + timedelta(days=90))
        pods = [store.environ(REDIS_REPLICAS="1"), store.environ(REDIS_REPLICAS="1"), front.environ(MAX_PENDING="14")]
        targets = {free_port(): discovered("hitcounter", f"hitcounter-{name}") for name in "abc"}
        try:
            spec = shortened_rules(FACTOR)
            with spawning("hitcounter") as spawn, Prometheus(folder, targets, spec, relabelling()) as prometheus:
                ports = []
                for environ, admin in zip(pods, targets, strict=True):
                    command = FAILING_TASK if "MAX_PENDING" in environ else ()
                    process = await asyncio.to_thread(spawn, environ | {"ADMIN_PORT": str(admin)}, folder, command)
                    ports.append(process.port)
                began = time.monotonic()
                load = Load(ports, 48, pause=0.05)
                running = asyncio.create_task(load.run(600))
                await faults(store, valkey)
                load.stop()
                await running
                await eventually(lambda: not prometheus.query('up{job="nanoservice"} == 0'), 10 * SLACK)
                seconds = time.monotonic() - began
                queries = {it: filled(it, "hitcounter") for it in expressions()}
                return {it: await asyncio.to_thread(prometheus.range, query, seconds) for it, query in queries.items()}
        finally:
            front.server.close()
            valkey.kill()


@pytest.mark.monitoring
@pytest.mark.asyncio(loop_factories=["asyncio"])  # the network of the replicated Redis can crash uvloop
async def test_every_query_of_the_dashboard_has_an_answer(tmp_path: Path) -> None:
    """`make dashboard-picture` draws the picture of docs/monitoring.md from the answers of this test."""
    found = await answers(tmp_path)
    assert [expression for expression, series in found.items() if not series] == []
    (tmp_path / "answers.json").write_text(json.dumps(found))
    picture = Path(os.environ.get("PICTURE", tmp_path / "picture.svg"))
    script, dashboard = ROOT / "monitoring" / "picture.py", COMPONENT / "dashboard.json"
    subprocess.run([packages(), script, dashboard, tmp_path / "answers.json", picture], check=True)
    assert picture.stat().st_size < 300_000


# hitcounter: end
