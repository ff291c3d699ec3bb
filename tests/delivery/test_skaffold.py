"""The files that skaffold.yaml names exist, and each profile changes the configuration as intended."""

import copy
import functools
import itertools
import json
import operator
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import ROOT
from tests.support.services import names, numbers, project

Object = dict[str, Any]

CONFIG: Object = yaml.safe_load((ROOT / "skaffold.yaml").read_text())
PROFILES: list[Object] = CONFIG["profiles"]
CONTAINERFILE = (ROOT / "Containerfile").read_text()
TOOL = "scripts/tools/skaffold"


def profiles_of(command: str) -> list[str]:
    """Return the profiles that a command of Skaffold activates, in the order in which Skaffold applies them."""
    return [one["name"] for one in PROFILES if {"command": command} in one.get("activation", [])]


def configured(*profiles: str) -> Object:
    """Return skaffold.yaml's configuration with these profiles applied. Fail if a patch of a profile does not apply."""
    config = copy.deepcopy(CONFIG)
    for profile in (one for one in PROFILES if one["name"] in profiles):
        assert profile.keys() <= {"name", "activation", "patches"}
        for patch in profile["patches"]:
            parents: list[Any]
            *parents, last = [int(key) if key.isdigit() else key for key in patch["path"].split("/")[1:]]
            parent: Any = functools.reduce(operator.getitem, parents, config)
            if last == "-":
                assert patch["op"] == "add"
                parent.append(patch["value"])
            else:
                assert (patch["op"], last in parent if isinstance(parent, dict) else True) in {("add", False), ("replace", True)}
                parent[last] = patch["value"]
    return config


def artifacts(config: Object) -> dict[str, Object]:
    """Return a dict from the name of each service to the artifact that builds its image."""
    found = {artifact["docker"]["buildArgs"]["SERVICE"]: artifact for artifact in config["build"]["artifacts"]}
    assert list(found) == names()
    return found


def rendered(config: Object) -> list[Object]:
    """Return the rendered objects of the variant that `config` deploys."""
    (path,) = config["manifests"]["kustomize"]["paths"]
    assert (ROOT / path / "kustomization.yaml").exists()
    return list(yaml.safe_load_all((ROOT / "manifests" / "rendered" / f"{Path(path).name}.yaml").read_text()))


COMBINATIONS = [
    (*profiles_of(command), *more)
    for command in ("run", "dev", "debug")
    for count in range(3)
    for more in itertools.combinations(("hermetic", "mirror"), count)
]


@pytest.mark.parametrize("profiles", COMBINATIONS, ids=lambda profiles: "+".join(profiles) or "none")
def test_build_finds_what_it_names(profiles: tuple[str, ...]) -> None:
    for artifact in artifacts(configured(*profiles)).values():
        docker = artifact["docker"]
        assert (ROOT / docker["dockerfile"]).exists()
        assert docker["buildArgs"].keys() <= set(re.findall(r"^ARG (\w+)", CONTAINERFILE, re.MULTILINE))
        flags = " ".join(docker["cliFlags"])
        assert ("--build-context=wheels=wheels" in flags, docker.get("network"), "PIP_NO_INDEX" in docker["buildArgs"]) == (
            (True, "none", True) if "hermetic" in profiles else (False, None, False)
        )
        bases = {"BASE", "DEBUG_BASE", "PYTHON"}
        assert docker["buildArgs"].keys() & bases == (bases if "mirror" in profiles else set())


@pytest.mark.parametrize(
    ("command", "target", "folder"), [("run", None, "minikube"), ("dev", "dev", "dev"), ("debug", "debug", "dev")]
)
def test_command_deploys_its_target(command: str, target: str | None, folder: str) -> None:
    config = configured(*profiles_of(command))
    assert {artifact["docker"].get("target") for artifact in artifacts(config).values()} == {target}
    assert target is None or re.search(rf"^FROM .* AS {target}$", CONTAINERFILE, re.MULTILINE)
    # Without a target, an engine builds the last stage, which must be the production image.
    assert re.findall(r"^FROM .* AS (\w+)$", CONTAINERFILE, re.MULTILINE)[-1] == "runtime"
    assert config["manifests"]["kustomize"]["paths"] == [f"manifests/{folder}"]
    images = [
        container["image"]
        for it in rendered(config)
        if "template" in it.get("spec", {})
        for container in it["spec"]["template"]["spec"]["containers"]
    ]
    assert [images.count(artifact["image"]) for artifact in artifacts(config).values()] == [1] * len(names())


def test_every_file_of_each_service_is_synced_to_its_place_and_nothing_else() -> None:
    for name, artifact in artifacts(configured(*profiles_of("dev"))).items():
        rules = artifact["sync"]["manual"]
        synced = {path.relative_to(ROOT) for rule in rules for path in ROOT.glob(rule["src"]) if path.is_file()}
        synced |= {path.relative_to(ROOT) for rule in rules for path in ROOT.glob(rule["src"] + "/*") if path.is_file()}
        files = [path for package in (name, "nanoservice") for path in (ROOT / package).rglob("*") if path.is_file()]
        assert synced == {path.relative_to(ROOT) for path in files}
        for rule in rules:
            assert rule.keys() == {"src", "dest"}  # without `strip`, a file PATH is copied to `dest`/PATH
            package = rule["src"].partition("/")[0]
            source = "${SERVICE}" if package == name else package
            assert f"\nCOPY {source}/ {rule['dest']}/{source}/\n" in CONTAINERFILE
            assert f"COPY --from=service --chown=65532:65532 {rule['dest']}/ {rule['dest']}/\n" in CONTAINERFILE
        assert "sync" not in artifacts(configured())[name]


@pytest.mark.parametrize("command", ["run", "dev"])
def test_port_of_each_service_is_forwarded(command: str) -> None:
    config = configured(*profiles_of(command))
    services = {it["metadata"]["name"]: it for it in rendered(config) if it["kind"] == "Service"}
    assert [forward["resourceName"] for forward in config["portForward"]] == names()
    for forward in config["portForward"]:
        service = services[forward["resourceName"]]
        assert (forward["resourceType"], forward["namespace"]) == ("service", service["metadata"]["namespace"])
        assert forward["port"] in [port["port"] for port in service["spec"]["ports"]]
        assert forward["localPort"] == 8080 + numbers()[forward["resourceName"]]


def test_smoke_test_s_job_fits_the_namespace_and_its_network_policy() -> None:
    (case,) = CONFIG["verify"]
    job = yaml.safe_load((ROOT / case["executionMode"]["kubernetesCluster"]["jobManifestPath"]).read_text())
    objects = rendered(CONFIG)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert case["container"]["name"] == container["name"]  # with another name, Skaffold would ignore the job's container
    assert case["container"]["image"] == container["image"]
    assert container["image"] in [artifact["image"] for artifact in artifacts(CONFIG).values()]
    assert case["container"]["command"][0] in CONTAINERFILE
    assert all(container["resources"][kind].keys() == {"cpu", "memory", "ephemeral-storage"} for kind in ("requests", "limits"))
    assert not {"runAsUser", "runAsGroup"} & job["spec"]["template"]["spec"]["securityContext"].keys()  # OpenShift sets these
    assert job["metadata"]["namespace"] == objects[0]["metadata"]["name"]
    # On a cluster, Pod Security has to admit this pod, and this policy has to allow its connections.
    (policy,) = (it for it in objects if it["metadata"]["name"] == job["metadata"]["name"])
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    script, *asked = case["container"]["args"]
    compile(script, "smoke test", "exec")
    assert asked == names()


def test_secrets_are_made_before_the_deployment() -> None:
    (hook,) = CONFIG["deploy"]["kubectl"]["hooks"]["before"]
    script = hook["host"]["command"][-1]
    assert re.search(rf"^make secret NAMESPACE={project()}$", script, re.MULTILINE)
    assert (ROOT / re.findall(r"--kustomize=(\S+)", script)[0] / "kustomization.yaml").exists()
    (namespace,) = (it["metadata"]["name"] for it in rendered(CONFIG) if it["kind"] == "Namespace")
    assert set(re.findall(r"namespace[ /](\w+) -", script)) == {namespace}


def test_all_files_name_the_same_version_of_skaffold() -> None:
    """The development container, `make tools`, the schema for editors and the tool that .ci/run builds have one version."""
    texts = {name: (ROOT / name).read_text() for name in ("devcontainer/Containerfile", ".devcontainer.json", f"{TOOL}/go.mod")}
    found = {
        name: re.findall(r"(?i)googlecontainertools/skaffold(?:/v2)?[/ ]v(\d[\d.]+)|/skaffold/releases/v(\d[\d.]+)", text)
        for name, text in texts.items()
    }
    assert [len(versions) for versions in found.values()] == [3, 1, 1]
    (version,) = {first or second for versions in found.values() for first, second in versions}
    schema = CONFIG["apiVersion"].removeprefix("skaffold/")
    assert f"/skaffold/v{version}/docs-v2/content/en/schemas/{schema}.json" in texts[".devcontainer.json"]
    major, minor, _ = version.split(".")
    assert f") {major}.{minor} or newer" in (ROOT / "docs" / "development.md").read_text()


# --- with Skaffold ---


@pytest.mark.skaffold
@pytest.mark.skipif(not shutil.which("go"), reason="Go reads the module")
def test_module_of_the_tool_replaces_what_skaffold_s_own_module_replaces() -> None:
    def module(*command: str) -> Object:
        """Return the lines `exclude` and `replace` of a go.mod, which Go follows only in the main module."""
        text = subprocess.run(["go", "-C", TOOL, *command], cwd=ROOT, check=True, text=True, capture_output=True).stdout
        return {key: sorted(json.loads(text)[key], key=str) for key in ("Exclude", "Replace")}

    (name,) = re.findall(r"^tool (.+/v\d+)/", (ROOT / TOOL / "go.mod").read_text(), re.MULTILINE)
    command = ["go", "-C", TOOL, "list", "-m", "-f", "{{.GoMod}}", name]
    own = subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout.strip()
    assert module("mod", "edit", "-json") == module("mod", "edit", "-json", own)


def plain(text: str) -> list[Object]:
    """Return the objects of a YAML text without Skaffold's labels, and without registry and tag in the names of images."""
    objects: list[Object] = [it for it in yaml.safe_load_all(text) if it]
    for it in objects:
        parts = [it["metadata"]]
        if template := it.get("spec", {}).get("template"):
            parts.append(template["metadata"])
            for container in template["spec"]["containers"]:
                container["image"] = re.sub(rf"^(.*/)?({'|'.join(names())})[:@].*", r"\2", container["image"])
        for part in parts:
            labels = {name: value for name, value in part.pop("labels", {}).items() if not name.startswith("skaffold.dev/")}
            if labels:
                part["labels"] = labels
    return objects


@pytest.mark.skaffold
@pytest.mark.parametrize("profiles", COMBINATIONS, ids=lambda profiles: "+".join(profiles) or "none")
def test_skaffold_renders_what_make_manifests_does(profiles: tuple[str, ...], tmp_path: Path) -> None:
    skaffold = shutil.which("skaffold")
    assert skaffold, "Skaffold is needed; to fetch it with Docker: make tools"
    output = tmp_path / "rendered.yaml"
    command = [skaffold, "render", "--offline", "--digest-source=none", f"--output={output}", f"--profile={','.join(profiles)}"]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    (path,) = configured(*profiles)["manifests"]["kustomize"]["paths"]
    made = (ROOT / "manifests" / "rendered" / f"{Path(path).name}.yaml").read_text()
    assert plain(output.read_text()) == plain(made)
