"""Run a real Prometheus and Alertmanager on loopback. They scrape services and evaluate rules; a test asks them queries."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import yaml

from nanoservice.testing.valkey import free_port
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT

COMPONENT = ROOT / "manifests" / "components" / "monitoring"
Labels = Mapping[str, str]


def program(name: str) -> str:
    """Return the path of the program `name` in the folder PROMETHEUS or, without PROMETHEUS, on PATH."""
    path = os.environ.get("PROMETHEUS")
    found = shutil.which(name, path=path) or shutil.which(f"prometheus-{name}", path=path)  # the second is Debian's name
    assert found, f"{name} is missing: run make test-monitoring"
    return found


def rules() -> Any:
    """Return the rules in the format of Prometheus. The operator gets the same rules, as a PrometheusRule."""
    return yaml.safe_load((COMPONENT / "rules.yaml").read_text())["spec"]


def alerts() -> dict[str, dict[str, Any]]:
    """Return each alert by its name."""
    return {rule["alert"]: rule for group in rules()["groups"] for rule in group["rules"] if "alert" in rule}


def shortened(duration: str, factor: int) -> str:
    """Return a duration of Prometheus, such as `5m`, divided by `factor`."""
    milliseconds = int(duration[:-1]) * {"s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}[duration[-1]]
    return f"{milliseconds // factor}ms"


def shortened_rules(factor: int) -> Any:
    """Return the rules with each window and each duration divided by `factor`."""
    spec = rules()
    for group in spec["groups"]:
        for part in (group, *group["rules"]):
            for name in {"for", "interval"} & part.keys():
                part[name] = shortened(part[name], factor)
            if "expr" in part:
                part["expr"] = re.sub(r"(?<=\[)\d+[smhd](?=\])", lambda window: shortened(window[0], factor), part["expr"])
    return spec


class Server:
    """A server of Prometheus on loopback, used as a context."""

    def __init__(self) -> None:
        self.port = free_port()

    def command(self) -> list[str]:
        """Return the command that starts the server."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        command = self.command()
        # Alertmanager of Debian 13, where scripts/debian.sh has unpacked it, reads its templates below its working directory.
        self.process = subprocess.Popen(command, cwd=Path(command[0]).parent.parent)
        try:
            wait_for(self._ready, 20 * SLACK, "it is ready")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def _ready(self) -> bool:
        assert self.process.poll() is None, "it stopped"
        try:
            return bool(urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=1).status == 200)
        except OSError:
            return False

    def ask(self, path: str, **parameters: object) -> Any:
        """Return the answer to a GET of its API, which is JSON."""
        url = f"http://127.0.0.1:{self.port}/api/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as answer:
            return json.loads(answer.read())


class Alertmanager(Server):
    """An Alertmanager with its data in `folder`, which notifies nobody."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        (folder / "alertmanager.json").write_text(
            json.dumps({"route": {"receiver": "nobody"}, "receivers": [{"name": "nobody"}]})
        )

    def command(self) -> list[str]:
        return [
            program("alertmanager"), f"--config.file={self._folder}/alertmanager.json", f"--storage.path={self._folder}/alerts",
            f"--web.listen-address=127.0.0.1:{self.port}", "--cluster.listen-address=", "--log.level=error",
        ]  # fmt: skip


class Prometheus(Server):
    """A Prometheus with its data in `folder`. It scrapes at each `interval` each port of `targets`, a dict from port to labels.

    `spec` is a set of rules, and `relabelling` is a list of relabel configurations, both in the format of Prometheus. Alerts are
    sent to the port `alertmanager`.
    """

    def __init__(
        self, folder: Path, targets: Mapping[int, Labels], spec: Any, relabelling: Sequence[Any] = (), *,
        interval: str = "1s", alertmanager: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self._folder = folder
        (folder / "rules.json").write_text(json.dumps(spec))
        job = {"job_name": "nanoservice", "relabel_configs": [*relabelling]}
        self._config: dict[str, Any] = {
            "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
            "rule_files": ["rules.json"],
            "scrape_configs": [job],
            "alerting": {
                "alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{alertmanager}"]}]}] if alertmanager else []
            },
        }
        self._configure(targets)

    def command(self) -> list[str]:
        return [
            program("prometheus"), f"--config.file={self._folder}/prometheus.json", f"--storage.tsdb.path={self._folder}/data",
            f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=error",
            "--rules.alert.resend-delay=1s",  # An alert that fires while the configuration is read again is not sent at first.
        ]  # fmt: skip

    def _configure(self, targets: Mapping[int, Labels]) -> None:
        static = [{"targets": [f"127.0.0.1:{port}"], "labels": dict(labels)} for port, labels in targets.items()]
        self._config["scrape_configs"][0]["static_configs"] = static
        (self._folder / "prometheus.json").write_text(json.dumps(self._config))

    def scrape(self, targets: Mapping[int, Labels]) -> None:
        """Scrape these targets from now on."""
        self._configure(targets)
        self.process.send_signal(signal.SIGHUP)

    def _ask(self, path: str, **parameters: object) -> Any:
        return self.ask(f"v1/{path}", **parameters)["data"]

    def query(self, expression: str) -> list[Any]:
        """Return the samples that answer the query now: each has the labels as `metric`, and a `value`."""
        found: list[Any] = self._ask("query", query=expression)["result"]
        return found

    def range(self, expression: str, seconds: float, step: float = 1) -> list[Any]:
        """Return the series that answer the query during the last `seconds`: each has the labels as `metric`, and `values`."""
        now = time.time()
        found: list[Any] = self._ask("query_range", query=expression, start=now - seconds, end=now, step=step)["result"]
        return found
