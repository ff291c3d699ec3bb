"""The API server accepts the component for monitoring, with the custom resources of the Prometheus operator.

The operator itself does not run: what a PodMonitor and a PrometheusRule make of a Prometheus is the operator's own business.
"""

import os
from collections.abc import Iterator

import pytest
import yaml

from tests.support.cluster import KUBECTL, Deployed, Namespace, compose, run
from tests.support.prometheus import COMPONENT

pytestmark = pytest.mark.cluster

# a folder, or the beginning of a URL
CRDS = os.environ.get("CRDS") or (
    "https://raw.githubusercontent.com/prometheus-operator/prometheus-operator/v0.93.0/example/prometheus-operator-crd"
)
KINDS = "podmonitors", "prometheusrules"


@pytest.fixture
def custom_resources() -> Iterator[None]:
    """Add the custom resources that the component needs. After the test, delete those that the cluster did not have before."""
    there = run(KUBECTL, "get", "customresourcedefinitions", "--output=name")
    missing = [f"{kind}.monitoring.coreos.com" for kind in KINDS if f"{kind}.monitoring.coreos.com" not in there]
    try:
        for name in missing:
            run(KUBECTL, "create", f"--filename={CRDS}/monitoring.coreos.com_{name.partition('.')[0]}.yaml")
            run(KUBECTL, "wait", "--for=condition=Established", f"customresourcedefinition/{name}", "--timeout=30s")
        yield
    finally:
        for name in missing:
            run(KUBECTL, "delete", "customresourcedefinition", name, "--ignore-not-found")


@pytest.mark.usefixtures("custom_resources")
def test_component_is_accepted_and_a_misspelt_field_is_refused(cluster: Deployed, other: Namespace) -> None:
    text = compose(cluster, other, "components: [../components/monitoring]")
    other.apply(text)
    assert other.get("prometheusrule", "nanoservice")["spec"] == yaml.safe_load((COMPONENT / "rules.yaml").read_text())["spec"]
    assert other.get("configmap", "nanoservice-dashboard")["data"] == {
        "dashboard.json": (COMPONENT / "dashboard.json").read_text()
    }

    selector = other.get("podmonitor", "nanoservice")["spec"]["selector"]["matchLabels"]
    selected = cluster.namespace.pods(",".join(f"{name}={value}" for name, value in selector.items()))
    assert [pod["metadata"]["labels"]["app.kubernetes.io/name"] for pod in selected] == ["hitcounter"]

    for field in "targetLabel", "annotations":
        with pytest.raises(AssertionError, match=f'unknown field "spec.*{field}x"'):
            other.apply(text.replace(f"{field}:", f"{field}x:"))
