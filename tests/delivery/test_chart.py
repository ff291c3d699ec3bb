"""The Helm chart has the objects that Kustomize renders, and each value changes what its description says.

The tests with the marker `chart` run Helm, which Go builds. helm-unittest runs the unit tests in chart/tests/.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanoservice import __version__ as VERSION
from tests.support import ROOT
from tests.support.helm import helm, program
from tests.support.services import names, project

CHART = ROOT / "chart"
RENDERED = ROOT / "manifests" / "rendered"
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
TESTS = sorted((CHART / "tests").glob("*_test.yaml"))
FIRST = names()[0]
Object = dict[str, Any]
with_helm = pytest.mark.chart

# --- the files that `make chart` writes ---


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_chart_follows_from_the_manifests_and_the_values(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHART, tmp_path / "chart"))
    shutil.rmtree(copy / "manifests")
    subprocess.run([sys.executable, ROOT / "scripts" / "chart.py", copy], check=True)
    assert files(copy) == files(CHART), "chart/ is stale; run: make chart"


def test_change_of_a_value_s_description_changes_the_readme(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHART, tmp_path / "chart"))
    values = copy / "values.yaml"
    values.write_text(values.read_text().replace("# A fixed number of pods", "# A constant number of pods"))
    subprocess.run([sys.executable, ROOT / "scripts" / "chart.py", copy], check=True)
    changed = {name for name, content in files(copy).items() if content != files(CHART)[name]}
    assert changed == {"values.yaml", "README.md"}
    assert "| A constant number of pods, in place of the autoscaler |" in (copy / "README.md").read_text()


def test_chart_has_the_version_of_the_services() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"], chart["name"]) == (VERSION, VERSION, project())
    assert f"/v{VERSION}/chart/icon.svg" in chart["icon"]


# --- the values ---


def fields(schema: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the schema of each field. In a path, NAME stands for a service, and EXAMPLE for a field of any name."""
    if "$ref" in schema:
        schema = SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]]
    if path:
        yield path, schema
    below = schema.get("properties", {}) | ({"0": schema["items"]} if "items" in schema else {})
    if schema.get("additionalProperties"):
        below["NAME" if path == "services" else "EXAMPLE"] = schema["additionalProperties"]
    for name, one in below.items():
        yield from fields(one, f"{path}.{name}".lstrip("."))


def described(path: str, schema: Any) -> bool:
    """Return whether values.yaml has to describe the field. Of a service, only the first level of fields is described."""
    if path.startswith("services"):
        return re.fullmatch(r"services\.NAME\.\w+", path) is not None
    return "properties" not in schema and path != "global" and not re.search(r"\.(0|EXAMPLE)", path)


FIELDS = dict(fields(SCHEMA))
VALUES = [path for path, schema in FIELDS.items() if described(path, schema)]


def test_each_value_is_described_with_its_default() -> None:
    table = (CHART / "README.md").read_text()
    rows = {path: (default, text) for path, default, text in re.findall(r"(?m)^\| `([\w.]+)` \| (.*?) \| (.+) \|$", table)}
    assert rows.keys() - {"services"} == set(VALUES)
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for path, (default, text) in rows.items():
        assert len(text) > 10
        if "NAME" not in path:
            assert yaml.safe_load(default.strip("`")) == functools.reduce(lambda it, key: it[key], path.split("."), values)


def test_example_of_a_service_has_each_of_its_values_and_follows_the_schema() -> None:
    example = yaml.safe_load("\n".join(re.findall(r"(?m)^# (  .*)$", (CHART / "values.yaml").read_text())))
    assert {f"services.NAME.{key}" for key in example[FIRST]} == {it for it in VALUES if "NAME" in it}


def settings(value: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each value that a unit test sets."""
    for key, one in value.items() if isinstance(value, dict) else []:
        path_of_it = f"{path}.{key}".lstrip(".")
        yield re.sub(r"^services\.[a-z0-9]+", "services.NAME", path_of_it)
        yield from settings(one, path_of_it)


def unit_tests() -> Iterator[Object]:
    for file in TESTS:
        yield from yaml.safe_load(file.read_text())["tests"]


def test_each_value_is_set_by_a_unit_test() -> None:
    set_here = {path for test in unit_tests() for path in settings(test.get("set", {}))}
    assert [path for path in VALUES if path not in set_here] == []


def values_file(folder: Path, path: str, value: Any) -> str:
    for key in reversed(path.replace("NAME", FIRST).split(".")):
        value = [value] if key.isdigit() else {key: value}
    (folder / "values.json").write_text(json.dumps(value))
    return f"--values={folder / 'values.json'}"


@with_helm
@pytest.mark.parametrize("path", FIELDS)
def test_value_of_a_wrong_type_is_refused(path: str, tmp_path: Path) -> None:
    types = FIELDS[path].get("type", "string")
    wrong: Any = 7 if not {"number", "integer"} & {*([types] if isinstance(types, str) else types)} else []
    refused = helm("template", "it", str(CHART), values_file(tmp_path, path, wrong), check=False)
    assert refused.returncode != 0
    place = "/" + path.replace("NAME", FIRST).replace(".", "/")
    assert re.search(rf"at '{place}': (got (number|array), want|value must be one of)", refused.stderr), refused.stderr


@with_helm
@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("replica", 3, "at '': additional properties 'replica' not allowed"),
        ("store.size", "1Gi", "at '/store': additional properties 'size' not allowed"),
        ("services.NAME.port", 1, f"at '/services/{FIRST}': additional properties 'port' not allowed"),
        ("services.nosuch.replicas", 1, f"services.nosuch: the services are {' '.join(names())}"),
        ("services.NAME.resources.limit", {}, f"at '/services/{FIRST}/resources': additional properties 'limit' not allowed"),
        ("services.NAME.settings.level", "x", "'level' does not match pattern"),
        ("imagePullSecrets", ["mine"], "at '/imagePullSecrets/0': got string, want object"),
        ("store.kind", "outside", "store.kind=outside needs store.host, the host of your Redis"),
        ("store", {"kind": "outside", "host": "redis.example.org"}, "store.kind=outside needs store.cidr"),
        ("store.port", 70000, "at '/store/port': maximum: got 70,000, want 65,535"),
        ("store.port", "6379", "at '/store/port': got string, want integer"),
        ("store.cidr", "example.org", "at '/store/cidr': 'example.org' does not match pattern"),
        ("store.cidr", "192.0.2.0/33", "at '/store/cidr': '192.0.2.0/33' does not match pattern"),
        ("store.host", "redis://redis.example.org", "at '/store/host': 'redis://redis.example.org' does not match pattern"),
        ("store.host", "redis.example.org:6379", "at '/store/host': 'redis.example.org:6379' does not match pattern"),
        ("store.host", "redis.example.org", "store.host needs store.kind=outside"),
        ("store.port", 6380, "store.port needs store.kind=outside"),
        ("store.cidr", "192.0.2.0/24", "store.cidr needs store.kind=outside"),
        ("store", {"kind": "replicated", "username": "me"}, "store.username needs store.kind=outside"),
        ("store", None, "missing property 'store'"),
        ("store.kind", None, "at '/store': missing property 'kind'"),
        ("registry", "https://mirror.example.com", "at '/registry': 'https://mirror.example.com' does not match pattern"),
        ("registry", "/team", "at '/registry': '/team' does not match pattern"),
        ("services.NAME", None, f"at '/services/{FIRST}': got null, want object"),
        ("services.NAME.image", "one two", "does not match pattern"),
        ("services.NAME.image", "https://registry.example.org/it:1", "does not match pattern"),
        ("services.NAME.image", "registry.example.org/it@sha256:12", "does not match pattern"),
        ("services.NAME.host", "https://count.example.org", "does not match pattern"),
        ("services.NAME.host", "count.example.org/path", "does not match pattern"),
        ("services.NAME.replicas", -1, f"at '/services/{FIRST}/replicas': minimum: got -1, want 0"),
        ("services.NAME.minReplicas", 99, f"services.{FIRST}: minReplicas is 99, which is more than maxReplicas"),
        ("services.NAME.settings.LIST", ["x"], f"at '/services/{FIRST}/settings/LIST': got array, want boolean or number"),
        ("services.NAME.settings.NULL", None, f"at '/services/{FIRST}/settings/NULL': got null, want boolean or number"),
        ("services.NAME.tlsSecret", "My Secret", "does not match pattern"),
    ],
    ids=lambda value: value if isinstance(value, str) and re.fullmatch(r"[\w.]+", value) else "",
)
def test_value_that_cannot_be_used_is_refused_with_the_reason(path: str, value: Any, words: str, tmp_path: Path) -> None:
    refused = helm("template", "it", str(CHART), values_file(tmp_path, path, value), check=False)
    assert refused.returncode != 0
    assert words in refused.stderr


# --- the objects ---


def objects(text: str) -> dict[str, Object]:
    """Return the objects in a YAML text, as a dict from kind and name to object."""
    found = [it for it in yaml.safe_load_all(text) if it]
    by_name = {f"{it['kind']}/{it['metadata']['name']}": it for it in found}
    assert len(by_name) == len(found)
    return by_name


def template(*arguments: str) -> dict[str, Object]:
    """Return the objects that `helm template` prints for the project's namespace, without those of hooks."""
    return objects(helm("template", "it", str(CHART), f"--namespace={project()}", "--no-hooks", *arguments).stdout)


STORES = {
    "": [],
    "-redis-tls": ["--set=store.tls=true"],
    "-redis-replicated": ["--set=store.kind=replicated"],
    "-redis-replicated-tls": ["--set=store.kind=replicated,store.tls=true"],
    "-redis-outside": ["--set=store.kind=outside,store.tls=true,store.host=redis.example.com,store.cidr=192.0.2.0/24"],
}
ON_A_LAPTOP = ["--set=expose=nodePort,autoscaling=false", *(f"--set=services.{name}.image={name}" for name in names())]
VARIANTS = {
    **{f"production{store}": arguments for store, arguments in STORES.items()},
    "production-monitoring": ["--set=monitoring.enabled=true"],
    "minikube": ON_A_LAPTOP,
}


def test_each_variant_of_kustomize_is_compared() -> None:
    # The variant `dev` needs the sources, which a chart does not have. The plugin of the README makes `production-openshift`.
    assert {path.stem for path in RENDERED.iterdir()} - {"dev", "production-openshift"} == VARIANTS.keys()


@with_helm
@pytest.mark.parametrize("variant", VARIANTS)
def test_chart_has_the_objects_of_the_variant_except_the_namespace(variant: str) -> None:
    expected = objects((RENDERED / f"{variant}.yaml").read_text())
    assert expected.pop(f"Namespace/{project()}")
    assert template(*VARIANTS[variant]) == expected


@with_helm
@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the component")
def test_plugin_of_the_readme_adds_a_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```sh\n(mkdir [^`]+?)helm install", (CHART / "README.md").read_text())
    components = os.path.relpath(ROOT / "manifests" / "components", tmp_path / "changes")
    block, replaced = re.subn(r'"https://\S+//manifests/components/(\w+)\?ref=v[\w.]+"', rf"{components}/\1", block)
    assert replaced == 1
    monkeypatch.setenv("HELM_DATA_HOME", str(tmp_path / "data"))
    script = f'helm() {{ "{program()}" "$@"; }}\n{block}'
    subprocess.run(["sh", "-ec", script], cwd=tmp_path, check=True, timeout=60)
    expected = objects((RENDERED / "production-openshift.yaml").read_text())
    expected.pop(f"Namespace/{project()}")
    assert template("--post-renderer=changes") == expected
    assert template() != expected  # the control


@with_helm
@pytest.mark.parametrize(("store", "monitoring", "exposed"), [*itertools.product(STORES, (False, True), (False, True))])
def test_values_that_choose_a_variant_can_be_combined(store: str, monitoring: bool, exposed: bool) -> None:
    """A value adds, changes or removes the same objects, whatever the other values are."""
    expected = objects((RENDERED / f"production{store}.yaml").read_text())
    production = objects((RENDERED / "production.yaml").read_text())
    arguments = [*STORES[store]]
    if monitoring:
        arguments.append("--set=monitoring.enabled=true")
        monitored = objects((RENDERED / "production-monitoring.yaml").read_text())
        expected |= {name: it for name, it in monitored.items() if name not in production}
    if exposed:
        arguments += ["--set=expose=nodePort,autoscaling=false"]
        minikube = objects((RENDERED / "minikube.yaml").read_text())
        expected |= {
            name: it for name, it in minikube.items() if name not in production or (it["kind"] == "Service" and name in expected)
        }
        expected = {name: it for name, it in expected.items() if it["kind"] not in ("Ingress", "HorizontalPodAutoscaler")}
    expected.pop(f"Namespace/{project()}")
    assert template(*arguments) == expected


def users(*files: Path) -> set[str]:
    """Return the users in Redis's ACL files, except `default`."""
    return set(re.findall(r"(?m)^user ([a-z0-9]+)", "".join(file.read_text() for file in files))) - {"default"}


@with_helm
def test_hooks_are_passwords_the_smoke_test_and_a_message_about_the_volumes() -> None:
    others = template()
    text = helm("template", "it", str(CHART), f"--namespace={project()}").stdout
    made = {name: it for name, it in objects(text).items() if name not in others}
    secrets = {"Secret/redis-users", *(f"Secret/{name}-redis" for name in names())}
    assert made.keys() == secrets | {"Job/smoke-test", "NetworkPolicy/smoke-test", "Job/kept-volumes"}
    assert made["Secret/redis-users"]["data"].keys() == users(*(ROOT / "manifests").rglob("*.acl"))
    passwords = [*made["Secret/redis-users"]["data"].values()]
    assert len({*passwords}) == len(passwords)
    assert {len(one) for one in passwords} == {60}  # 43 characters in base64
    for name in names():
        assert made[f"Secret/{name}-redis"]["data"] == {"password": made["Secret/redis-users"]["data"][name]}


def test_readme_names_the_users_who_need_a_password() -> None:
    (item,) = re.findall(r"- `redis-users`,(.+?);\n", (CHART / "README.md").read_text(), re.DOTALL)
    single, replicated = item.split("`store.kind: replicated`")
    always = users(ROOT / "manifests" / "redis" / "users.acl")
    folder = ROOT / "manifests" / "components" / "redis-replicated"
    more = users(folder / "replicated.acl", folder / "sentinel.acl")
    assert set(re.findall("`(\\w+)`", single)) == always - {*names()}
    assert set(re.findall("`(\\w+)`", replicated)) == more - always


@with_helm
def test_objects_get_the_namespace_of_the_release() -> None:
    text = helm("template", "it", str(CHART), "--namespace=another", "--set=monitoring.enabled=true,store.kind=replicated").stdout
    assert {it["metadata"]["namespace"] for it in objects(text).values()} == {"another"}


@with_helm
@pytest.mark.parametrize(
    ("path", "value"),
    [
        *itertools.product(["registry"], ["localhost:5000", "[fd00::5]:5000/team/", "192.0.2.1/a/b"]),
        *itertools.product(["services.NAME.image", "store.image"], ["it:1.0", f"example.org:5000/a/it:1@sha256:{'1' * 64}"]),
        *itertools.product(["services.NAME.host"], ["*.example.org", "one-2"]),
        *itertools.product(["store.host"], ["redis_1", "192.0.2.1", "2001:db8::1"]),
        *itertools.product(["store.cidr"], ["198.51.100.1/32", "0.0.0.0/0", "2001:db8::/128"]),
    ],
)
def test_unusual_value_is_used_as_it_is(path: str, value: str, tmp_path: Path) -> None:
    others = STORES["-redis-outside"] if path in ("store.host", "store.cidr") else []
    file = values_file(tmp_path, path, value)
    arguments = [re.sub(rf",{path}=[^,]*", "", argument) for argument in others]  # an argument overrides the file
    assert value.strip("/") in helm("template", "it", str(CHART), *arguments, file).stdout


@with_helm
def test_annotations_of_the_manifests_stay(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHART, tmp_path / "chart"))
    single = copy / "manifests" / "single.yaml"
    found = [*yaml.safe_load_all(single.read_text())]
    for it in found:
        it["metadata"]["annotations"] = {"mine": "1"}
        if it["kind"] == "Deployment":
            it["spec"]["template"]["metadata"]["annotations"] = {"mine": "1"}
    single.write_text("\n---\n".join(yaml.safe_dump(it) for it in found))
    values = ["--set=ingress.annotations.theirs=two", f"--set=services.{FIRST}.settings.A=2"]
    made = objects(helm("template", "it", str(copy), *values).stdout)
    assert made[f"Ingress/{FIRST}"]["metadata"]["annotations"] == {"mine": "1", "theirs": "two"}
    annotations = made[f"Deployment/{FIRST}"]["spec"]["template"]["metadata"]["annotations"]
    assert annotations.keys() == {"mine", "checksum/settings"}


@with_helm
def test_setting_that_is_a_number_is_not_reformatted(tmp_path: Path) -> None:
    given = {"A": 1000000, "B": True, "C": "1e6", "D": 0.5}
    made = template(values_file(tmp_path, "services.NAME.settings", given))
    (config,) = (it for name, it in made.items() if name.startswith(f"ConfigMap/{FIRST}-"))
    assert config["data"].items() >= {"A": "1000000", "B": "true", "C": "1e6", "D": "0.5"}.items()


@with_helm
def test_another_chart_can_have_this_chart_under_another_name(tmp_path: Path) -> None:
    Path(shutil.copytree(CHART, tmp_path / "outer" / "charts" / project()))
    dependency = {"name": project(), "version": VERSION, "repository": "", "alias": "inner"}
    outer = {"apiVersion": "v2", "name": "outer", "version": "1.0.0", "dependencies": [dependency]}
    (tmp_path / "outer" / "Chart.yaml").write_text(json.dumps(outer))
    arguments = [str(tmp_path / "outer"), f"--namespace={project()}", "--no-hooks", "--set=inner.expose=nodePort"]
    # The command `install` also prints the notes.
    said = helm("install", "it", *arguments, "--dry-run=client", "--render-subchart-notes").stdout
    assert "pod-security.kubernetes.io/enforce=restricted" in said.partition("\nNOTES:\n")[2]
    assert objects(helm("template", "it", *arguments).stdout) == template("--set=expose=nodePort")


# --- Helm's own checks ---


@with_helm
def test_helm_finds_nothing_to_correct() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART)).stdout


@with_helm
def test_unit_tests_pass() -> None:
    ended = subprocess.run([program("helm-unittest"), "--strict", str(CHART)], text=True, capture_output=True, timeout=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{len([*unit_tests()])} passed, {len([*unit_tests()])} total" in ended.stdout


@with_helm
def test_unit_tests_fail_if_a_template_is_wrong(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(CHART, tmp_path / "chart"))
    objects_yaml = copy / "templates" / "objects.yaml"
    text = objects_yaml.read_text()
    objects_yaml.write_text(text.replace('set .spec "replicas"', 'set .spec "replica"'))
    assert objects_yaml.read_text() != text
    ended = subprocess.run([program("helm-unittest"), str(copy)], text=True, capture_output=True, timeout=120)
    assert ended.returncode != 0
    assert "replicas" in ended.stdout


# --- the package of a release ---


def package(dist: Path, root: Path = ROOT, **environ: str) -> Path:
    """Make the package in `dist` from the sources in `root`, and return its path."""
    (dist / "release").mkdir(parents=True)
    release = " ".join(f"{name}=ghcr.io/someone/{name}@sha256:{'1' * 64}" for name in names())
    given = os.environ | {"HELM": program(), "DIST": str(dist), "RELEASE": release} | environ
    subprocess.run(["sh", "scripts/chart-package.sh"], cwd=root, env=given, check=True, timeout=60)
    return dist / "release" / f"{project()}-{VERSION}.tgz"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return package(tmp_path_factory.mktemp("one"), GITHUB_REPOSITORY="someone/there")


@with_helm
def test_package_is_the_same_on_another_machine(packed: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for name in ("chart", "scripts", "nanoservice"):
        shutil.copytree(ROOT / name, root / name, copy_function=shutil.copy)  # the copies have the present time
    shutil.copy(ROOT / "CHANGELOG.md", root)
    old = os.umask(0o077)
    try:
        again = package(tmp_path / "dist", root, GITHUB_REPOSITORY="someone/there", TZ="Asia/Tokyo")
    finally:
        os.umask(old)
    assert hashlib.sha256(packed.read_bytes()).digest() == hashlib.sha256(again.read_bytes()).digest()
    assert packed.stat().st_mtime == again.stat().st_mtime  # the registry's annotation has this time


@with_helm
def test_package_names_the_images_of_the_release_and_what_changed(packed: Path) -> None:
    chart = yaml.safe_load(helm("show", "chart", str(packed)).stdout)
    images = yaml.safe_load(chart["annotations"]["artifacthub.io/images"])
    assert {it["name"] for it in images} == {*names(), "valkey"}
    assert all(re.search("@sha256:(?!0{64})[0-9a-f]{64}$", it["image"]) for it in images)
    changes = yaml.safe_load(chart["annotations"]["artifacthub.io/changes"])
    _, _, rest = (ROOT / "CHANGELOG.md").read_text().partition(f"\n## {VERSION}\n")
    section = " ".join(f" {rest.partition(chr(10) + '## ')[0]}".split())
    assert f"- {' - '.join(changes)}" == section
    assert (chart["home"], chart["sources"]) == ("https://github.com/someone/there", ["https://github.com/someone/there"])
    links = re.findall(r"\]\(([^#)]\S*)\)", helm("show", "readme", str(packed)).stdout)
    assert f"https://github.com/someone/there/blob/v{VERSION}/docs/operations.md" in {it.partition("#")[0] for it in links}
    assert not [it for it in links if not it.startswith("https://")]
    with tarfile.open(packed) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
        assert inside >= {"README.md", "values.schema.json", "templates/NOTES.txt", "icon.svg"}
        assert not [name for name in inside if name.startswith("tests/")]
    made = objects(helm("template", "it", str(packed)).stdout)
    pods = [it["spec"]["template"]["spec"] for it in made.values() if "template" in it.get("spec", {})]
    used = {container["image"] for pod in pods for container in pod["containers"]}
    assert used <= {it["image"] for it in images}
    assert "registry.example.com" not in str(made)
