"""The API server accepts the component for monitoring, with the custom resources of the Prometheus operator.

The operator itself does not run: what a PodMonitor and a PrometheusRule make of a Prometheus is the operator's own business.
"""

import pytest
import yaml

from tests.support.cluster import Deployed, Namespace, compose
from tests.support.prometheus import COMPONENT

pytestmark = pytest.mark.cluster


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
