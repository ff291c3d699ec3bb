"""The manifests agree with the code and with each other, and pods have only the rights that they need.

The tests check the rendered file of each variant, because clusters get the objects in these files.
"""

import re
import shutil
import subprocess
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate  # type: ignore[import-untyped] # the package has no types
import pytest
import trustme
import yaml
from kubernetes_validate import utils

from nanoservice import config, probes
from nanoservice.config import variables
from nanoservice.server import SHUTDOWN_SECONDS
from nanoservice.service import create_app
from tests.support import ROOT
from tests.support.services import numbers, project, services

Object = dict[str, Any]

MANIFESTS = ROOT / "manifests"
COMPONENTS = sorted(folder.name for folder in (MANIFESTS / "components").iterdir())
DNS_COMPONENTS = [name for name in COMPONENTS if name.startswith("dns-")]
RENDERED = {path.stem: list(yaml.safe_load_all(path.read_text())) for path in sorted((MANIFESTS / "rendered").glob("*.yaml"))}
PRODUCTION = [variant for variant in RENDERED if variant.startswith("production")]
ON_A_LAPTOP = [variant for variant in RENDERED if variant not in PRODUCTION]
WITH_REDIS = [variant for variant in RENDERED if not variant.endswith("redis-outside")]
REPLICATED = [variant for variant in RENDERED if "redis-replicated" in variant]
MONITORED = "production-monitoring"
SINGLE = [variant for variant in WITH_REDIS if variant not in REPLICATED]
OPENSHIFT = "production-openshift"
SERVERS = ["redis-0", "redis-1", "redis-2"]  # the pods of the replicated Redis
CA = trustme.CA()
SERVICES, NUMBERS = services(), numbers()
KUBERNETES = [f"1.{minor}" for minor in range(30, 38)]

LABEL = "app.kubernetes.io/"
COMPONENT = MANIFESTS / "components" / "redis-replicated"
STATEFULSET, CONF, COMPOSE = MANIFESTS / "redis" / "statefulset.yaml", MANIFESTS / "redis" / "valkey.conf", ROOT / "compose.yaml"
VALKEY_CONF = [line.split(maxsplit=1) for line in CONF.read_text().splitlines() if line[:1] > "#"]
USERS = {
    line.split()[1]: line.split()[2:]
    for line in (MANIFESTS / "redis" / "users.acl").read_text().splitlines()
    if line.startswith("user ")
}


@dataclass(frozen=True)
class Workload:
    """An object that runs pods, in the manifests of one variant."""

    variant: str
    object: Object

    def __str__(self) -> str:
        return f"{self.variant}-{self.name}"

    @property
    def kind(self) -> str:
        return str(self.object["kind"])

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.object["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def pod(self) -> Object:
        pod: Object = self.object["spec"]["template"]["spec"]
        return pod

    @property
    def containers(self) -> list[Object]:
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]

    @property
    def container(self) -> Object:
        """Return the pod's container that has the workload's name. Only a replicated Redis has another one, the Sentinel."""
        (container,) = (it for it in self.containers if it["name"] == self.name)
        return container

    @property
    def sentinel(self) -> Object:
        (container,) = (it for it in self.containers if it["name"] == "redis-sentinel")
        return container

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def mounts(self) -> dict[str, Object]:
        return self.mounts_of(self.container)

    def mounts_of(self, container: Object) -> dict[str, Object]:
        """Return a dict from mount path to volume. A volume has its type as a key: `{"name": ..., "secret": {...}}`."""
        claims = self.object["spec"].get("volumeClaimTemplates", [])
        volumes = {claim["metadata"]["name"]: {"persistentVolumeClaim": claim["spec"]} for claim in claims}
        volumes |= {volume["name"]: volume for volume in self.pod["volumes"]}
        assert {mount["name"] for it in self.containers for mount in it["volumeMounts"]} == volumes.keys()
        return {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}

    def secret_file(self, path: str) -> tuple[str, str]:
        """Return the secret and the key whose value is in the file `path` of the container."""
        secret = self.mounts[str(Path(path).parent)]["secret"]
        items = secret.get("items", [{"key": Path(path).name, "path": Path(path).name}])
        (key,) = (item["key"] for item in items if item["path"] == Path(path).name)
        return secret["secretName"], key


def of_kind(variant: str, *kinds: str) -> list[Object]:
    return [it for it in RENDERED[variant] if it["kind"] in kinds]


def named(variant: str, kind: str, name: str) -> Object:
    (found,) = (it for it in of_kind(variant, kind) if it["metadata"]["name"] == name)
    return found


def workloads(variant: str) -> list[Workload]:
    return [Workload(variant, it) for it in RENDERED[variant] if "template" in it.get("spec", {})]


def selected(variant: str, labels: dict[str, str]) -> Workload:
    """Return the workload whose pods have `labels`. Fail unless there is exactly one such workload."""
    assert labels
    (found,) = (it for it in workloads(variant) if labels.items() <= it.labels.items())
    return found


def redis(variant: str) -> Workload:
    return Workload(variant, named(variant, "StatefulSet", "redis"))


def setting(name: str) -> str:
    """Return the value of the setting `name` in valkey.conf."""
    (value,) = (value for key, value in VALKEY_CONF if key == name)
    return value


def number(quantity: str) -> float:
    """Convert a quantity of Kubernetes or Valkey, such as `100m` or `64Mi`, to a number of cores or bytes."""
    digits, unit = re.fullmatch(r"([0-9.]+)(\w*)", str(quantity)).groups()  # type: ignore[union-attr] # None is a wrong quantity
    return float(digits) * {"": 1, "m": 0.001, "mb": 2**20, "Mi": 2**20, "Gi": 2**30}[unit]


WORKLOADS = [it for variant in RENDERED for it in workloads(variant)]
of_each_workload = pytest.mark.parametrize("workload", WORKLOADS, ids=str)
of_each_service = pytest.mark.parametrize("workload", [it for it in WORKLOADS if it.name in SERVICES], ids=str)
in_each_variant = pytest.mark.parametrize("variant", RENDERED)


# --- the objects ---


def test_every_variant_is_rendered() -> None:
    components = set(COMPONENTS) - set(DNS_COMPONENTS)
    assert RENDERED.keys() == {"minikube", "dev", "production", *(f"production-{name}" for name in components)}


@in_each_variant
def test_variant_has_only_the_objects_that_these_tests_check(variant: str) -> None:
    # If you add a kind to these lists, add rules for that kind below.
    store = ["ConfigMap", "NetworkPolicy", "Service", "StatefulSet"] if variant in WITH_REDIS else []
    store += ["PodDisruptionBudget", "Service", "Service"] if variant in REPLICATED else []
    scaled = ["HorizontalPodAutoscaler", "Ingress"] * len(SERVICES) if variant in PRODUCTION else []
    service = ["ConfigMap", "Deployment", "NetworkPolicy", "PodDisruptionBudget", "Service"]
    namespace = ["Namespace", "NetworkPolicy"]
    smoke_test = ["NetworkPolicy"] if variant in ON_A_LAPTOP else []
    monitoring = ["ConfigMap", "PodMonitor", "PrometheusRule"] if variant == MONITORED else []
    kinds = store + scaled + service * len(SERVICES) + namespace + smoke_test + monitoring
    assert sorted(it["kind"] for it in RENDERED[variant]) == sorted(kinds)
    assert {it.name for it in workloads(variant)} == SERVICES.keys() | ({"redis"} if store else set())


def test_no_secret_is_in_the_manifests() -> None:
    for path in MANIFESTS.rglob("*.yaml"):
        assert not re.search(r"kind['\"]?:\s*['\"]?Secret\b|secretGenerator|stringData", path.read_text()), path


@pytest.mark.parametrize("variant", WITH_REDIS)
def test_rendered_files_of_redis_are_those_of_the_sources(variant: str) -> None:
    data = named(variant, "ConfigMap", redis(variant).mounts["/etc/redis"]["configMap"]["name"])["data"]
    files = [MANIFESTS / "redis" / name for name in ("redis.sh", "users.acl", "valkey.conf")]
    if variant in REPLICATED:
        files += [COMPONENT / name for name in ("replicated.sh", "replicated.acl", "replicated.conf", "sentinel.acl")]
    assert data == {path.name: path.read_text() for path in files}


# --- Kubernetes' own rules ---


@pytest.fixture(autouse=True)
def schemas_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "schema_contents", read_schema)


read_schema = cache(utils.schema_contents)


@pytest.mark.parametrize("version", KUBERNETES)
def test_schema_of_each_kubernetes_accepts_every_object(version: str) -> None:
    checked: list[Object] = []
    for it in (it for variant in RENDERED for it in RENDERED[variant]):
        custom = it["apiVersion"].startswith("monitoring.coreos.com/")  # tests/e2e/test_monitoring.py checks these
        if not custom and it not in checked:  # most objects are the same in all variants
            # If validate() has no schema for `version`, it uses an older schema. validate() returns the version of the
            # schema that it used, so this comparison finds a missing schema.
            assert kubernetes_validate.validate(it, version, strict=True) == version
            checked.append(it)
    read_schema.cache_clear()  # the cached schemas take 40 MB


@pytest.mark.parametrize("version", KUBERNETES)
def test_schema_of_each_kubernetes_finds_a_misspelt_field(version: str) -> None:
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "x"},
        "spec": {"ports": [{"port": 1, "tragetPort": 1}]},
    }
    with pytest.raises(kubernetes_validate.ValidationError, match="tragetPort"):
        kubernetes_validate.validate(service, version, strict=True)


@in_each_variant
def test_every_object_is_in_a_namespace_that_enforces_restricted(variant: str) -> None:
    (namespace,) = of_kind(variant, "Namespace")
    levels = {name.split("/")[1]: level for name, level in namespace["metadata"]["labels"].items() if "pod-security" in name}
    assert levels == {"enforce": "restricted", "warn": "restricted", "audit": "restricted"}
    others = [it for it in RENDERED[variant] if it is not namespace]
    assert {it["metadata"]["namespace"] for it in others} == {namespace["metadata"]["name"]}


# --- pods ---


@of_each_workload
def test_pod_is_hardened(workload: Workload) -> None:
    assert workload.pod["automountServiceAccountToken"] is False
    assert workload.pod["enableServiceLinks"] is False
    assert not workload.pod.keys() & {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"}
    context = workload.pod["securityContext"]
    numbers = {name: value for name, value in context.items() if name in ("runAsUser", "runAsGroup", "fsGroup")}
    if workload.variant == OPENSHIFT:
        assert not numbers  # OpenShift sets these numbers, and refuses a pod that names others
    else:
        assert len(numbers) == 3
        assert all(type(value) is int and value > 10_000 for value in numbers.values())
    assert context["runAsNonRoot"] is True
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in workload.containers:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            # In the variant `dev`, live sync writes changed files into the service's container.
            "readOnlyRootFilesystem": (workload.variant, workload.name) not in {("dev", name) for name in SERVICES},
            "capabilities": {"drop": ["ALL"]},
        }


@of_each_workload
def test_container_has_requests_and_limits(workload: Workload) -> None:
    for container in workload.containers:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert requests.keys() == limits.keys() == {"cpu", "memory", "ephemeral-storage"}
        for name in requests:
            assert 0 < number(requests[name]) <= number(limits[name])


@of_each_workload
def test_storage_that_is_requested_holds_the_volumes_and_the_log(workload: Workload) -> None:
    for container in workload.containers:
        volumes = [volume["emptyDir"] for volume in workload.mounts_of(container).values() if "emptyDir" in volume]
        on_disk = sum(number(volume["sizeLimit"]) for volume in volumes if volume.get("medium") != "Memory")
        log = 5 * number("10Mi")  # 5 and 10Mi are the kubelet's defaults for containerLogMaxFiles and containerLogMaxSize
        assert number(container["resources"]["requests"]["ephemeral-storage"]) >= on_disk + log


@pytest.mark.parametrize("workload", [it for it in WORKLOADS if it.variant != OPENSHIFT], ids=str)
def test_users_are_the_same_as_in_compose_and_redis_has_its_own(workload: Workload) -> None:
    # In compose.yaml Redis and the services mount the same volume of secrets. A file's group decides which container can read the
    # file.
    context, composed = workload.pod["securityContext"], yaml.safe_load(COMPOSE.read_text())["services"]
    assert composed[workload.name]["user"] == f"{context['runAsUser']}:{context['runAsGroup']}"
    assert context["runAsUser"] == context["runAsGroup"] == context["fsGroup"]
    users = {it.name: it.pod["securityContext"]["runAsUser"] for it in workloads(workload.variant)}
    assert users.pop("redis", None) not in users.values()


@of_each_workload
def test_volumes_are_mounted_whole_and_secrets_and_configmaps_read_only(workload: Workload) -> None:
    for container in workload.containers:
        for mount in container["volumeMounts"]:
            assert mount.keys() <= {"name", "mountPath", "readOnly"}  # the kubelet never updates files of a subPath
            given = workload.mounts_of(container)[mount["mountPath"]].keys() & {"secret", "configMap"}
            assert mount.get("readOnly", False) is bool(given)
    for volume in (volume for container in workload.containers for volume in workload.mounts_of(container).values()):
        assert volume.keys() & {"secret", "configMap", "emptyDir", "persistentVolumeClaim"}
        assert "secret" not in volume or volume["secret"]["defaultMode"] == 0o440
        assert "emptyDir" not in volume or volume["emptyDir"]["sizeLimit"]


@of_each_workload
def test_image_never_moves(workload: Workload) -> None:
    for container in workload.containers:
        assert container["imagePullPolicy"] == "IfNotPresent"
        by_digest = re.fullmatch(r"[a-z0-9./:-]+@sha256:[0-9a-f]{64}", container["image"])
        # In the variants for a laptop, a service's image may be only a name, without registry, tag and digest. The deployment
        # replaces this name with the image that was built.
        assert by_digest or (workload.variant not in PRODUCTION and container["image"] == workload.name in SERVICES)
        assert ":latest" not in container["image"]


@of_each_workload
def test_workload_and_its_pods_have_the_recommended_labels(workload: Workload) -> None:
    component = "service" if workload.name in SERVICES else "store"
    expected = {"name": workload.name, "component": component, "part-of": project()}
    assert workload.labels == workload.object["metadata"]["labels"] == {LABEL + key: value for key, value in expected.items()}


# --- services: the code and the manifests agree ---


def settings(workload: Workload) -> dict[str, str]:
    """Return the environment variables of the workload's container."""
    container = workload.container
    found: dict[str, str] = {}
    for source in container["envFrom"]:
        found |= named(workload.variant, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container["env"]:
        assert variable.keys() == {"name", "value"}
        assert variable["name"] not in found
        found[variable["name"]] = variable["value"]
    return found


def configured(workload: Workload, folder: Path) -> Any:
    """Return the settings that the service reads from the workload's environment. Files in `folder` stand in for secrets."""
    service, environ = SERVICES[workload.name], settings(workload)
    for name, spec in variables(service.config):
        if name in environ and spec.metadata["parse"] in {config.file, config.certificates, config.password_file}:
            secret, key = workload.secret_file(environ[name])
            environ[name] = str(folder / f"{secret}.{key}")
            CA.cert_pem.write_to_path(environ[name])  # a certificate can stand in for a password too
    return service.config.read(environ)


@of_each_service
def test_service_knows_every_variable_and_accepts_its_value(workload: Workload, tmp_path: Path) -> None:
    known = {name for name, _ in variables(SERVICES[workload.name].config)}
    assert settings(workload).keys() <= known
    assert configured(workload, tmp_path).log_format == ("text" if workload.variant == "dev" else "json")


@of_each_service
def test_service_authenticates_with_the_password_that_is_made_for_it(workload: Workload, tmp_path: Path) -> None:
    assert configured(workload, tmp_path).redis_username == workload.name
    assert workload.secret_file(settings(workload)["REDIS_PASSWORD_FILE"]) == (f"{workload.name}-redis", "password")


def workload_port(variant: str, name: str) -> int:
    """Return the port that has this name in the Service of each server of the replicated Redis."""
    ports = {
        port["port"] for server in SERVERS for port in named(variant, "Service", server)["spec"]["ports"] if port["name"] == name
    }
    (port,) = ports
    return int(port)


@of_each_service
def test_service_finds_redis(workload: Workload, tmp_path: Path) -> None:
    read = configured(workload, tmp_path)
    if workload.variant not in WITH_REDIS:
        assert read.redis_tls
        return
    if workload.variant in REPLICATED:
        assert [*read.redis_sentinels] == [(name, workload_port(workload.variant, "sentinel")) for name in SERVERS]
        assert read.redis_replicas == 1
    else:
        service = named(workload.variant, "Service", read.redis_host)
        assert [port["port"] for port in service["spec"]["ports"]] == [read.redis_port]
        assert read.redis_replicas == 0
    assert read.redis_tls == ("--tls-port" in redis(workload.variant).container.get("args", []))


@of_each_service
def test_ports_are_those_that_the_service_listens_on(workload: Workload, tmp_path: Path) -> None:
    read = configured(workload, tmp_path)
    assert workload.ports == {"http": read.bind_port, "admin": read.admin_port}
    assert (read.bind_host, workload.container["name"]) == ("", workload.name)


@of_each_service
def test_probes_ask_the_right_paths(workload: Workload, tmp_path: Path) -> None:
    expected = {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    found = {name: probe for name, probe in workload.container.items() if name.endswith("Probe")}
    assert {name: probe["httpGet"] for name, probe in found.items()} == {
        name: {"path": path, "port": "http"} for name, path in expected.items()
    }
    # The liveness probe must not check Redis, because restarting the service would not fix Redis.
    routes = create_app(SERVICES[workload.name], configured(workload, tmp_path)).router.routes()
    handlers = {(route.method, route.resource.canonical): route.handler for route in routes if route.resource}
    assert handlers["GET", "/livez"] is probes.livez
    assert ("GET", "/readyz") in handlers
    assert found["readinessProbe"]["timeoutSeconds"] > probes._CHECK_TIMEOUT


@of_each_service
def test_readiness_outlasts_a_restart_of_redis(workload: Workload) -> None:
    probe = workload.container["readinessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 30


@of_each_service
def test_grace_period_is_longer_than_a_shutdown_can_take(workload: Workload, tmp_path: Path) -> None:
    drain = configured(workload, tmp_path).drain_seconds
    assert 0 < drain
    assert drain + SHUTDOWN_SECONDS < workload.pod["terminationGracePeriodSeconds"]


@of_each_service
def test_rollout_keeps_every_ready_pod_and_spreads_pods_over_nodes(workload: Workload) -> None:
    spec = workload.object["spec"]
    assert workload.kind == "Deployment"
    assert spec["strategy"] == {"rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}}
    (spread,) = workload.pod["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["whenUnsatisfiable"]) == ("kubernetes.io/hostname", "ScheduleAnyway")
    assert selected(workload.variant, spread["labelSelector"]["matchLabels"]) == workload


@of_each_service
def test_changed_settings_roll_the_pods(workload: Workload) -> None:
    (source,) = workload.container["envFrom"]
    assert re.fullmatch(workload.name + "-[a-z0-9]{10}", source["configMapRef"]["name"])


# --- the objects around the pods ---


@of_each_workload
def test_workload_selects_its_own_pods(workload: Workload) -> None:
    assert selected(workload.variant, workload.object["spec"]["selector"]["matchLabels"]) == workload


@in_each_variant
def test_services_show_one_port_and_never_the_admin_port(variant: str) -> None:
    ports = {}
    for service in of_kind(variant, "Service"):
        if service["metadata"]["name"] in SERVERS:
            continue  # a test below checks these
        workload = selected(variant, service["spec"]["selector"])
        assert service["metadata"]["name"] == workload.name
        assert service["spec"].keys() <= {"ports", "selector", "type"}
        (port,) = service["spec"]["ports"]
        assert workload.ports[port["targetPort"]] != config.Config.admin_port
        ports[workload.name] = port | {"type": service["spec"].get("type", "ClusterIP")}
    http = {"name": "http", "port": 80, "targetPort": "http", "type": "ClusterIP"}
    expected = dict.fromkeys(SERVICES, http)
    if variant in ON_A_LAPTOP:
        assert len(set(NUMBERS.values())) == len(NUMBERS)
        expected = {name: http | {"nodePort": 30080 + number, "type": "NodePort"} for name, number in NUMBERS.items()}
    if variant in SINGLE:
        expected["redis"] = {"name": "redis", "port": 6379, "targetPort": "redis", "type": "ClusterIP"}
    assert ports == expected


@in_each_variant
def test_drain_of_a_node_evicts_one_pod_of_a_service_at_a_time_and_never_waits_for_redis(variant: str) -> None:
    budgets = [{**it["spec"]} for it in of_kind(variant, "PodDisruptionBudget")]
    expected = [*SERVICES, *(["redis"] if variant in REPLICATED else [])]
    assert sorted(selected(variant, budget.pop("selector")["matchLabels"]).name for budget in budgets) == sorted(expected)
    assert budgets == [{"maxUnavailable": 1, "unhealthyPodEvictionPolicy": "AlwaysAllow"}] * len(expected)


@of_each_service
def test_number_of_pods_is_set_by_the_autoscaler_only(workload: Workload) -> None:
    assert "replicas" not in workload.object["spec"]
    scalers = [it for it in of_kind(workload.variant, "HorizontalPodAutoscaler") if it["metadata"]["name"] == workload.name]
    assert len(scalers) == (workload.variant in PRODUCTION)
    for scaler in (it["spec"] for it in scalers):
        assert scaler["scaleTargetRef"] == {"apiVersion": "apps/v1", "kind": "Deployment", "name": workload.name}
        assert 2 <= scaler["minReplicas"] < scaler["maxReplicas"]
        (metric,) = scaler["metrics"]
        aim = number(metric["resource"]["target"]["averageValue"])
        # The service has one thread, which uses at most one core. So the autoscaler must aim for less than one core.
        assert number(workload.container["resources"]["requests"]["cpu"]) < aim < 1


@pytest.mark.parametrize("variant", PRODUCTION)
def test_ingress_leads_to_an_existing_port(variant: str) -> None:
    ingresses = of_kind(variant, "Ingress")
    assert {ingress["metadata"]["name"] for ingress in ingresses} == SERVICES.keys()
    hosts = [rule["host"] for ingress in ingresses for rule in ingress["spec"]["rules"]]
    assert len(set(hosts)) == len(hosts)
    for ingress in ingresses:
        for path in (path for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]):
            backend = path["backend"]["service"]
            assert backend["name"] == ingress["metadata"]["name"]
            ports = named(variant, "Service", backend["name"])["spec"]["ports"]
            assert backend["port"]["name"] in {port["name"] for port in ports}


@in_each_variant
def test_network_policies_allow_what_is_needed_and_nothing_else(variant: str) -> None:
    both = ["Ingress", "Egress"]
    policies = {it["metadata"]["name"]: it["spec"] for it in of_kind(variant, "NetworkPolicy")}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": both}
    redis_ports = [{"port": 6379}]
    if variant in REPLICATED:
        redis_ports.append({"port": 26379})
        among = [{"port": "redis"}, {"port": "sentinel"}]
        assert policies.pop("redis") == {
            "podSelector": {"matchLabels": {LABEL + "name": "redis"}},
            "policyTypes": both,
            "ingress": [
                {"from": [{"podSelector": {"matchExpressions": [_is(LABEL + "component", "service", "store")]}}], "ports": among}
            ],
            "egress": [
                {"to": [{"podSelector": {"matchLabels": {LABEL + "name": "redis"}}}], "ports": among},
                {
                    "to": [_pods("kube-system", {"k8s-app": "kube-dns"}), {"ipBlock": {"cidr": "169.254.20.10/32"}}],
                    "ports": _udp_and_tcp(53),
                },
            ],
        }
    elif variant in WITH_REDIS:
        assert policies.pop("redis") == {
            "podSelector": {"matchLabels": {LABEL + "name": "redis"}},
            "policyTypes": both,
            "ingress": [
                {"from": [{"podSelector": {"matchLabels": {LABEL + "component": "service"}}}], "ports": [{"port": "redis"}]}
            ],
        }
    to_redis: Object = {"podSelector": {"matchExpressions": [_is(LABEL + "name", "redis")]}}
    if variant not in WITH_REDIS:
        to_redis = {"ipBlock": {"cidr": "192.0.2.0/24"}}
    dns = {
        "namespaceSelector": {"matchExpressions": [_is("kubernetes.io/metadata.name", "kube-system")]},
        "podSelector": {"matchExpressions": [_is("k8s-app", "kube-dns")]},
    }
    any_dns = {
        "to": [dns, {"ipBlock": {"cidr": "169.254.20.10/32"}}],
        "ports": _udp_and_tcp(53),
    }
    of_openshift = {
        "to": [_pods("openshift-dns", {"dns.operator.openshift.io/daemonset-dns": "default"})],
        "ports": _udp_and_tcp(5353),
    }
    if variant in ON_A_LAPTOP:
        assert policies.pop("smoke-test") == {
            "podSelector": {"matchLabels": {LABEL + "name": "smoke-test"}},
            "policyTypes": both,
            "egress": [
                {
                    "to": [{"podSelector": {"matchLabels": {LABEL + "component": "service"}}}],
                    "ports": [{"port": "http"}],
                },
                any_dns,
            ],
        }
    prometheus = {
        "namespaceSelector": {"matchExpressions": [_is("kubernetes.io/metadata.name", "monitoring")]},
        "podSelector": {"matchExpressions": [_is(LABEL + "name", "prometheus")]},
    }
    assert policies == {
        name: {
            "podSelector": {"matchLabels": {LABEL + "name": name}},
            "policyTypes": both,
            "ingress": [{"ports": [{"port": "http"}]}, {"from": [prometheus], "ports": [{"port": "admin"}]}],
            "egress": [
                {"to": [to_redis], "ports": redis_ports},
                any_dns,
                *[of_openshift] * (variant == OPENSHIFT),
            ],
        }
        for name in SERVICES
    }


def test_every_service_is_scraped_with_the_labels_that_the_rules_need() -> None:
    (monitor,) = of_kind(MONITORED, "PodMonitor")
    selector, (endpoint,) = monitor["spec"]["selector"]["matchLabels"], monitor["spec"]["podMetricsEndpoints"]
    scraped = [it for it in workloads(MONITORED) if selector.items() <= it.labels.items()]
    assert {it.name: it.ports[endpoint["port"]] for it in scraped} == dict.fromkeys(SERVICES, config.Config.admin_port)
    of_the_pod = "__meta_kubernetes_pod_label_" + re.sub(r"\W", "_", LABEL + "name")
    assert endpoint["relabelings"] == [
        {"targetLabel": "job", "replacement": "nanoservice"},
        {"targetLabel": "service", "sourceLabels": [of_the_pod]},
    ]


def test_operator_and_grafana_get_the_rules_and_the_dashboard_of_the_sources() -> None:
    folder = MANIFESTS / "components" / "monitoring"
    (rule,) = of_kind(MONITORED, "PrometheusRule")
    assert rule["spec"] == yaml.safe_load((folder / "rules.yaml").read_text())["spec"]
    dashboard = named(MONITORED, "ConfigMap", "nanoservice-dashboard")
    assert dashboard["data"] == {"dashboard.json": (folder / "dashboard.json").read_text()}
    assert dashboard["metadata"]["labels"]["grafana_dashboard"] == "1"


def _is(label: str, *values: str) -> Object:
    return {"key": label, "operator": "In", "values": [*values]}


def _pods(namespace: str, labels: dict[str, str]) -> Object:
    return {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "podSelector": {"matchLabels": labels},
    }


def _udp_and_tcp(port: int) -> list[Object]:
    return [{"port": port, "protocol": "UDP"}, {"port": port, "protocol": "TCP"}]


# For each component, what it adds to the addresses and to the ports of each rule for DNS.
DNS: dict[str, tuple[list[Object], list[Object]]] = {
    "dns-cilium": ([_pods("kube-system", {"k8s-app": "node-local-dns"})], []),
    "dns-gardener": ([], _udp_and_tcp(8053)),
    "dns-gke": ([{"ipBlock": {"cidr": "169.254.169.254/32"}}], []),
    "dns-kubespray": ([{"ipBlock": {"cidr": "169.254.25.10/32"}}], []),
}


@pytest.mark.parametrize(("variant", "further"), [("minikube", "smoke-test"), ("production-redis-replicated", "redis")])
@pytest.mark.parametrize("component", DNS_COMPONENTS)
def test_component_for_another_dns_admits_this_dns_and_changes_nothing_else(
    variant: str, further: str, component: str, tmp_path: Path
) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl renders the component")
    shutil.copy(MANIFESTS / "rendered" / f"{variant}.yaml", tmp_path)
    shutil.copytree(MANIFESTS / "components" / component, tmp_path / component)
    (tmp_path / "kustomization.yaml").write_text(f"resources: [{variant}.yaml]\ncomponents: [{component}]\n")
    command = ["kubectl", "kustomize", str(tmp_path)]
    rendered = subprocess.run(command, check=True, capture_output=True, timeout=60).stdout
    expected = deepcopy(RENDERED[variant])
    for policy in (it for it in expected if it["kind"] == "NetworkPolicy" and it["metadata"]["name"] in {*SERVICES, further}):
        addresses, ports = DNS[component]
        policy["spec"]["egress"][1]["to"] += addresses
        policy["spec"]["egress"][1]["ports"] += ports
    assert list(yaml.safe_load_all(rendered)) == expected


# --- Redis ---


def test_redis_keeps_what_it_acknowledged_and_forgets_nothing() -> None:
    expected = {
        "appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "save": '""', "dir": "/data",
    }  # fmt: skip
    assert {name: setting(name) for name in expected} == expected
    for variant in WITH_REDIS:
        assert redis(variant).object["spec"]["replicas"] == (3 if variant in REPLICATED else 1)
        assert "persistentVolumeClaim" in redis(variant).mounts[setting("dir")]


@pytest.mark.parametrize("variant", WITH_REDIS)
def test_claim_is_the_same_whichever_kustomize_renders_it(variant: str) -> None:
    # Some versions of Kustomize add a variant's labels to the claim template. Kubernetes refuses every later change of a claim
    # template, so the rendered template must be the same as the template in the file.
    templates = redis(variant).object["spec"]["volumeClaimTemplates"]
    assert templates == yaml.safe_load(STATEFULSET.read_text())["spec"]["volumeClaimTemplates"]
    assert [claim["metadata"]["labels"] for claim in templates] == [{LABEL + "part-of": project()}]


def check_sizes(store: Workload, conf: str, compose: str) -> None:
    """Check that the sizes of `store`, and of Redis in the text `compose`, follow from the maxmemory in the text `conf`."""
    (most,) = (number(line.split()[1]) for line in conf.splitlines() if line.startswith("maxmemory "))
    resources, tmp = store.container["resources"], store.mounts["/tmp"]["emptyDir"]["sizeLimit"]
    # Valkey forks to rewrite the append-only file, and the fork may copy every page of memory.
    assert number(resources["limits"]["memory"]) == 3 * most + number("32Mi")
    assert number(tmp) == 2 * most  # for the snapshot of a backup
    assert number(resources["limits"]["ephemeral-storage"]) == number(tmp) + number("64Mi")
    # Requests must equal limits, because a node first evicts the pods that use more than they request.
    for name in ("memory", "ephemeral-storage"):
        assert resources["requests"][name] == resources["limits"][name]
    assert number(store.mounts["/data"]["persistentVolumeClaim"]["resources"]["requests"]["storage"]) >= 8 * most
    composed = yaml.safe_load(compose)["services"]["redis"]
    assert composed["deploy"]["resources"]["limits"]["memory"] + "i" == resources["limits"]["memory"]  # Docker's M means Mi
    assert f"/tmp:mode=1777,size={tmp.removesuffix('Mi')}m" in composed["tmpfs"]


@pytest.mark.parametrize("variant", WITH_REDIS)
def test_redis_has_room_for_a_rewrite_and_a_snapshot(variant: str) -> None:
    check_sizes(redis(variant), CONF.read_text(), COMPOSE.read_text())


def test_recipe_for_more_memory_is_complete_and_each_of_its_changes_is_needed() -> None:
    runbook = (ROOT / "docs" / "operations.md").read_text()
    changes = re.findall(r"^\| `(manifests/redis/\S+|compose\.yaml)` \| `(.+?)` \| `(.+?)` \|", runbook, re.MULTILINE)
    sources = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (STATEFULSET, CONF, COMPOSE)}
    assert {file for file, _, _ in changes} == sources.keys()

    def check(changes: list[tuple[str, str, str]]) -> None:
        texts = dict(sources)
        for file, old, new in changes:
            assert old in texts[file]
            texts[file] = texts[file].replace(old, new)
        statefulset, conf, compose = texts.values()
        check_sizes(Workload("changed", yaml.safe_load(statefulset)), conf, compose)

    check(changes)
    for left_out in changes:
        with pytest.raises(AssertionError):
            check([change for change in changes if change is not left_out])


@pytest.mark.parametrize("variant", WITH_REDIS)
def test_redis_is_run_by_its_script_and_every_path_of_it_is_mounted(variant: str) -> None:
    container, mounts = redis(variant).container, redis(variant).mounts
    assert container["command"] == ["sh", "/etc/redis/redis.sh", "start"]
    found = {name: probe["exec"]["command"][2:] for name, probe in container.items() if name.endswith("Probe")}
    assert found == {"livenessProbe": ["alive"], "readinessProbe": ["ready"]}
    script = (MANIFESTS / "redis" / "redis.sh").read_text()
    if variant in REPLICATED:
        further = (COMPONENT / "replicated.sh").read_text()
        script += further if variant.endswith("-tls") else re.sub("^tls=.*", "", further, flags=re.MULTILINE)
    mounts |= {"/etc/hosts": {}, "/etc/resolv.conf": {}}  # the kubelet mounts these in every container
    for path in re.findall(r"(?<![\w/])/(?:etc|run|data|tmp)\b[\w/.]*", script + " ".join(value for _, value in VALKEY_CONF)):
        assert any(Path(path).is_relative_to(folder) for folder in mounts), path
    assert setting("unixsocket") in script
    assert f"mv {setting('aclfile')}.new {setting('aclfile')}" in script
    assert mounts["/run/secrets/redis"]["secret"]["secretName"] == "redis-users"


@pytest.mark.parametrize("variant", WITH_REDIS)
def test_redis_listens_on_its_port_only(variant: str) -> None:
    args = redis(variant).container.get("args", [])
    options = dict(zip(args[::2], args[1::2], strict=True))
    assert redis(variant).ports == {"redis": int(setting("port"))}
    if args:
        assert (options["--port"], options["--tls-port"]) == ("0", setting("port"))
        files = [value for name, value in options.items() if name.endswith("-file")]
        assert [redis(variant).secret_file(path)[0] for path in files] == ["redis-tls"] * 3


def test_only_services_probes_and_the_operator_are_users_and_services_have_their_own_keys() -> None:
    assert USERS["default"] == ["off"]
    assert USERS.keys() == {"default", "probe", "operator"} | SERVICES.keys()
    for name, rights in list(USERS.items())[1:]:
        keys = [f"~{{{name}}}:*"] if name in SERVICES else []
        assert rights[: len(keys) + 2] == ["resetchannels", *keys, "-@all"]
        assert all(re.fullmatch(r"\+[a-z]+(\|[a-z]+)?", right) for right in rights[len(keys) + 2 :])
    assert USERS["probe"][2:] == ["+ping"]
    assert USERS["operator"][2:] == ["+acl|load", "+sync", "+psync", "+replconf"]


# --- the replicated Redis ---


@pytest.mark.parametrize("variant", REPLICATED)
def test_each_server_and_its_sentinel_have_an_address_of_their_own(variant: str) -> None:
    for server in SERVERS:
        spec = named(variant, "Service", server)["spec"]
        assert spec["selector"] == {"statefulset.kubernetes.io/pod-name": server}
        assert spec["publishNotReadyAddresses"] is True
        ports = [(port["name"], port["port"], port["targetPort"]) for port in spec["ports"]]
        assert ports == [("redis", 6379, "redis"), ("sentinel", 26379, "sentinel")]
    assert f'pods="{" ".join(SERVERS)}"' in (COMPONENT / "replicated.sh").read_text()


@pytest.mark.parametrize("variant", REPLICATED)
def test_servers_are_on_different_nodes_each_with_a_sentinel(variant: str) -> None:
    workload = redis(variant)
    (spread,) = workload.pod["topologySpreadConstraints"]
    assert (spread["maxSkew"], spread["topologyKey"]) == (1, "kubernetes.io/hostname")
    assert spread["whenUnsatisfiable"] == "DoNotSchedule"
    assert selected(variant, spread["labelSelector"]["matchLabels"]) == workload
    assert [container["name"] for container in workload.containers] == ["redis", "redis-sentinel"]


@pytest.mark.parametrize("variant", REPLICATED)
def test_sentinel_is_run_by_the_same_script_and_image_and_remembers_the_primary(variant: str) -> None:
    workload = redis(variant)
    sentinel = workload.sentinel
    assert sentinel["command"] == ["sh", "/etc/redis/redis.sh", "sentinel"]
    assert sentinel["image"] == workload.container["image"]
    assert sentinel["env"] == [{"name": "SERVER", "value": "sentinel"}]
    mounts = workload.mounts_of(sentinel)
    assert mounts["/data"] == workload.mounts["/data"]
    assert mounts["/run/valkey"] != workload.mounts["/run/valkey"]  # each container has its own socket and file of users there
    for path in mounts.keys() - {"/data", "/run/valkey"}:
        assert mounts[path] == workload.mounts[path]
    # Both use the same certificate.
    assert ("/run/secrets/redis-tls" in mounts) is ("/run/secrets/redis-tls" in workload.mounts) is variant.endswith("-tls")


@pytest.mark.parametrize("variant", REPLICATED)
def test_primary_hands_over_before_it_stops(variant: str) -> None:
    workload = redis(variant)
    assert workload.container["lifecycle"] == {"preStop": {"exec": {"command": ["sh", "/etc/redis/redis.sh", "hand-over"]}}}
    # The hand-over takes at most 17 s, and Valkey's own shutdown waits at most 10 s for its replicas.
    assert workload.pod["terminationGracePeriodSeconds"] >= 17 + 10


def test_users_of_the_replicated_redis_have_the_rights_that_they_need_and_no_more() -> None:
    # test_replicated_rights.py checks that these rights are enough.
    lines = [line.split() for name in ("replicated.acl", "sentinel.acl") for line in (COMPONENT / name).read_text().splitlines()]
    for words in (line for line in lines if line and line[0] != "#"):
        rights = words[1:] if words[0] == "services" else words[2:]
        assert words[0] in ("user", "services")
        assert rights == ["off"] or all(
            re.fullmatch(r"(resetchannels|allchannels|-@all|\+[a-z]+(\|[a-z-]+)?)", it) for it in rights
        )
    assert {words[1] for words in lines if words and words[0] == "user"} == {
        "default",
        "probe",
        "operator",
        "replica",
        "sentinel",
    }
