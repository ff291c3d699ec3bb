"""The services are the folders that have a `__main__.py`, and every command and every list follows from these folders."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.git import ENVIRON, unusual
from tests.support.helm import helm
from tests.support.pages import Step, steps
from tests.support.services import names


def script(name: str, *arguments: str, cwd: Path = ROOT, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a script of `cwd`/scripts with only PATH and `environ` as its environment."""
    command = ["sh", f"scripts/{name}", *arguments]
    return subprocess.run(
        command, cwd=cwd, env={"PATH": os.environ["PATH"], **environ}, text=True, capture_output=True, timeout=60
    )


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Create a folder with the scripts and three services: `b` has the number 0, `a` the number 1, and `c` has no number."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    for name in "abc":
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").touch()
    (tmp_path / "no_service").mkdir()
    for name in ("Big", "my_service", "my-service", "two words", 'quo"te', "1st", "a.b"):  # no service can have such a name
        (tmp_path / name).mkdir()
        (tmp_path / name / "__main__.py").touch()
    (tmp_path / "manifests" / "minikube").mkdir(parents=True)
    ports = "".join(
        f"  - target: {{kind: Service, name: {name}}}\n    patch: |-\n"
        f"      - {{op: add, path: /spec/ports/0/nodePort, value: {port}}}\n"
        for name, port in (("b", 30080), ("a", 30081))
    )
    (tmp_path / "manifests" / "minikube" / "kustomization.yaml").write_text(f"patches:\n{ports}")
    return tmp_path


def test_services_are_listed_with_their_ports_in_a_fixed_order(three: Path) -> None:
    _, *rows = script("services.sh", cwd=three).stdout.splitlines()
    assert [row.split() for row in rows] == [
        ["b", "8080", "9090", "5678", "30080"],
        ["a", "8081", "9091", "5679", "30081"],
        "c is not complete: make service NAME=c".split(),
    ]
    assert script("services.sh", "names", cwd=three).stdout.split() == ["b", "a", "c"]
    assert script("services.sh", "json", cwd=three).stdout == 'services=["b","a","c"]\n'


def test_tests_know_the_services_that_make_knows() -> None:
    assert sorted(names()) == sorted(path.parent.name for path in ROOT.glob("*/__main__.py"))


def test_script_runs_for_each_service_or_for_the_one_that_is_named(three: Path) -> None:
    (three / "scripts" / "tell.sh").write_text('echo "$SERVICE $IMAGE $LAYOUT"\n[ "$SERVICE" != c ]\n')
    one = script("each.sh", "tell.sh", cwd=three, SERVICE="a", IMAGE="x")
    assert (one.returncode, one.stdout) == (0, "a x a.oci\n")
    every = script("each.sh", "tell.sh", cwd=three)
    assert (every.returncode, every.stdout) == (1, "b b b.oci\na a a.oci\nc c c.oci\n")


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        *(
            ({"SERVICE": name}, f"SERVICE={name}: the services are b a c; to make another: make service NAME=...")
            for name in ("d", "b/", "./b", ".", "my_service", "scripts/template/starter", "-x")
        ),
        ({"IMAGE": "x"}, "IMAGE= and LAYOUT= name one image, so name the image's service: SERVICE=..."),
        ({"LAYOUT": "x"}, "IMAGE= and LAYOUT= name one image, so name the image's service: SERVICE=..."),
    ],
    ids=lambda value: " ".join(f"{key}={text}" for key, text in value.items()) if isinstance(value, dict) else "",
)
def test_choice_that_is_not_clear_is_refused(three: Path, environ: dict[str, str], words: str) -> None:
    (three / "scripts" / "tell.sh").write_text("echo told\n")
    ended = script("each.sh", "tell.sh", cwd=three, **environ)
    assert (ended.returncode, ended.stdout, ended.stderr) == (1, "", f"make: {words}\n")


def test_each_service_runs_on_its_own_ports_unless_told_otherwise(three: Path) -> None:
    python = three / "bin" / "python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho "$* $BIND_PORT $ADMIN_PORT"\n')
    python.chmod(0o755)
    for environ, said in (
        ({}, "-m b 8080 9090"),
        ({"SERVICE": "a"}, "-m a 8081 9091"),
        ({"SERVICE": "a", "BIND_PORT": "1"}, "-m a 1 9091"),
    ):
        assert script("run.sh", cwd=three, VENV=str(three), **environ).stdout == f"{said}\n"
    assert "SERVICE=d: the services are" in script("run.sh", cwd=three, VENV=str(three), SERVICE="d").stderr
    incomplete = script("run.sh", cwd=three, VENV=str(three), SERVICE="c")
    assert (incomplete.stdout, incomplete.stderr) == ("", "make: c is not complete: make service NAME=c\n")


# --- make service, make remove ---

FIRST = names()[0]
NEW, NEWER = [name for name in ("likes", "visits", "stars") if name != FIRST][:2]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files of the repository into a git repository of its own, with the first service only. Return its folder."""
    if not (ROOT / ".git").exists() or not shutil.which("kubectl"):
        pytest.skip("`make service` needs git and kubectl")
    folder = tmp_path_factory.mktemp("clone")
    for name in tree(ROOT):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    git(folder, "init", "--quiet")
    for name in names()[1:]:
        assert service(folder, "remove", name, FORCE="1").returncode == 0
    commit(folder, "one")
    return folder


@pytest.fixture
def repository(clone: Path) -> Iterator[Path]:
    """Yield the folder `clone`, and afterwards remove everything that the test changed there."""
    yield clone
    git(clone, "reset", "--quiet", "--hard", "one")
    git(clone, "clean", "--quiet", "-dfx")


@pytest.fixture
def trio(repository: Path) -> Path:
    """Return `repository` with the services FIRST, NEW and NEWER, which have the numbers 0, 1 and 2. All are committed."""
    if not git(repository, "tag", "--list", "three"):
        for name in (NEW, NEWER):
            assert service(repository, "add", name, KUBECTL="true").returncode == 0  # these tests need no rendered manifests
        commit(repository, "three")
    git(repository, "reset", "--quiet", "--hard", "three")
    return repository


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"safe.directory={folder}", "-c", "core.hooksPath=/dev/null"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], env=ENVIRON, check=True, text=True, capture_output=True
    ).stdout


def commit(folder: Path, tag: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", f"--message={tag}")
    git(folder, "tag", tag)


def service(folder: Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run scripts/service.py of `folder`, as make does."""
    command = [sys.executable, "scripts/service.py", *arguments]
    return subprocess.run(command, cwd=folder, env={**os.environ, **environ}, text=True, capture_output=True, timeout=120)


def tree(folder: Path) -> dict[str, bytes]:
    """Return the content of each file in `folder` that git does not ignore."""
    listed = git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    return {name: path.read_bytes() for name in listed if (path := folder / name).is_file()}


def check(folder: Path, *arguments: str) -> None:
    """Check the style of the Python files in `folder` and the schema of its compose.yaml, and run pytest with `arguments`."""
    tools = Path(sys.executable).parent
    commands: list[list[str | Path]] = [
        [tools / "ruff", "check", "--quiet", "."],
        [tools / "ruff", "format", "--quiet", "--check", "."],
        [tools / "check-jsonschema", "--quiet", "--builtin-schema=vendor.compose-spec", "compose.yaml"],
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", *arguments],
    ]
    for command in commands:
        ended = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=300)
        assert ended.returncode == 0, ended.stdout + ended.stderr


def test_no_list_lacks_a_service() -> None:
    checked = service(ROOT, "check")
    assert checked.returncode == 0, checked.stderr


def edit(path: Path, old: str, new: str) -> None:
    """Replace the text `old`, which is in the file once."""
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.mark.generator
def test_ten_services_have_ten_of_everything(repository: Path) -> None:
    # The lists have these words in other meanings, too.
    made = ["store", "sbom", "run", "metrics", "data", "cpu", "backend", "app", "api"]
    # What people have changed in the entries of one service must not get into those of another.
    edit(repository / "compose.yaml", f"      REDIS_USERNAME: {FIRST}\n", f"      REDIS_USERNAME: {FIRST}\n      EDITED: x\n")
    edit(repository / "manifests" / "production" / "ingress.yaml", f"{FIRST}.example.com", "edited.example.org")
    edit(repository / "manifests" / "production" / "autoscaler.yaml", "maxReplicas: 8", "maxReplicas: 9")
    for name in made:
        # Only the last run needs to render the manifests.
        made_one = service(repository, "add", name, KUBECTL="kubectl" if name == made[-1] else "true")
        assert made_one.returncode == 0, made_one.stderr
    every = [FIRST, *made]
    assert script("services.sh", "names", cwd=repository).stdout.split() == every
    assert script("services.sh", "json", cwd=repository).stdout == f"services={json.dumps(every, separators=(',', ':'))}\n"
    check(repository, "tests/delivery/test_manifests.py", "-k", "accepts_every_object and 1.34 or only_the_objects or in_redis")
    for variant in ("minikube", "dev", "production"):
        objects = list(yaml.safe_load_all((repository / "manifests" / "rendered" / f"{variant}.yaml").read_text()))
        kinds = [it["kind"] for it in objects if it["metadata"]["name"] in every]
        assert {kinds.count(kind) for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy")} == {10}
        node_ports = [it["spec"]["ports"][0].get("nodePort") for it in objects if it["kind"] == "Service"]
        assert variant == "production" or sorted(filter(None, node_ports)) == list(range(30080, 30090))
    hosts = [it["spec"]["rules"][0]["host"] for it in objects if it["kind"] == "Ingress"]
    assert sorted(hosts) == sorted(["edited.example.org", *(f"{name}.example.com" for name in made)])
    scaled = {it["spec"]["scaleTargetRef"]["name"]: it["spec"]["maxReplicas"] for it in objects if "Autoscaler" in it["kind"]}
    assert scaled == {FIRST: 9} | dict.fromkeys(made, 8)
    compose = yaml.safe_load((repository / "compose.yaml").read_text())
    assert (list(compose["networks"]), list(compose["volumes"])) == (["outside", "store"], ["data", "secrets"])
    services = compose["services"]
    for name in every:
        assert services[name]["build"]["args"]["SERVICE"] == name
        own = {key: text for key, text in services[f"{name}-tls"]["environment"].items() if name in text or key == "EDITED"}
        files = {f"REDIS_{key}_FILE": f"/run/secrets/{name}/{file}" for key, file in (("PASSWORD", "password"), ("CA", "ca.crt"))}
        assert own == {"REDIS_USERNAME": name, **files} | ({"EDITED": "x"} if name == FIRST else {})
    published = {name: re.findall(r"(\w+)_PORT:-(\d+)", one["ports"][0])[0] for name, one in services.items() if name in every}
    assert published == {name: (name.upper(), str(8080 + number)) for number, name in enumerate(every)}
    skaffold = yaml.safe_load((repository / "skaffold.yaml").read_text())
    assert [artifact["image"] for artifact in skaffold["build"]["artifacts"]] == every
    targets = [patch["path"] for patch in skaffold["profiles"][0]["patches"] if patch["path"].endswith("target")]
    assert targets == [f"/build/artifacts/{index}/docker/target" for index in range(10)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "a service's name is a DNS label and a Python package at once"),
        ("Likes", "a service's name is a DNS label and a Python package at once"),
        ("my-likes", "a service's name is a DNS label and a Python package at once"),
        ("my_likes", "a service's name is a DNS label and a Python package at once"),
        ("1likes", "a service's name is a DNS label and a Python package at once"),
        ("a" * 31, "a service's name is a DNS label and a Python package at once"),
        ("../likes", "a service's name is a DNS label and a Python package at once"),
        ("class", "this is a keyword of Python"),
        ("json", "Python's standard library has a module of this name"),
        ("aiohttp", "an installed package has this name"),
        ("redis", "manifests/redis/ exists already, and is not a service"),
        ("support", "tests/support/ exists already, and is not a service"),
        ("nanoservice", "nanoservice/ exists already, and is not a service"),
        ("operator", "Python's standard library has a module of this name"),
        ("probe", " has a user of this name already, whose rights the service would get"),
        ("sentinel", "manifests/components/redis-replicated/replicated.acl has a user of this name already"),
        ("taken", "compose.yaml has an entry of this name already"),
        ("on", "YAML reads this word as a value"),
        ("session", "variables that begin with SESSION_ exist already"),
        ("starter", "the template in scripts/"),
        ("dist", ".gitignore names this folder"),
    ],
)
def test_name_that_cannot_be_used_is_refused_with_the_reason(repository: Path, name: str, words: str) -> None:
    edit(repository / "compose.yaml", "\nnetworks:\n", "\n  taken:\n    image: x\n\nnetworks:\n")
    before = tree(repository)
    refused = service(repository, "add", name)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(f"make: NAME={name}: ")
    assert words in refused.stderr
    assert tree(repository) == before


def test_failure_half_way_leaves_the_tree_as_it_was(repository: Path, tmp_path: Path) -> None:
    before = tree(repository)
    failing = tmp_path / "kubectl"
    failing.write_text("#!/bin/sh\nexit 1\n")
    failing.chmod(0o755)
    for kubectl in (str(failing), "no-such-kubectl"):
        failed = service(repository, "add", NEW, KUBECTL=kubectl)
        assert failed.returncode == 1
        assert "so nothing has changed" in failed.stderr
        assert ("kubectl is needed" in failed.stderr) == (kubectl == "no-such-kubectl")
        assert tree(repository) == before
    # One file cannot be written, so the files that were changed already have to be restored.
    blocking = repository / "manifests" / "redis" / ".users.acl.new"
    blocking.mkdir()
    assert service(repository, "add", NEW).returncode == 1
    blocking.rmdir()
    assert tree(repository) == before


def test_git_says_itself_why_it_cannot_list_the_files(repository: Path) -> None:
    said = service(repository, "add", NEW, KUBECTL="true", GIT_DIR="gone").stderr
    assert "git cannot list the files of this folder" in said
    assert "fatal: not a git repository: 'gone'" in said


def test_only_service_and_unknown_service_are_not_removed(repository: Path) -> None:
    before = tree(repository)
    assert "this is the only service" in service(repository, "remove", FIRST).stderr
    assert f"NAME={NEW}: the services are {FIRST}" in service(repository, "remove", NEW).stderr
    assert tree(repository) == before


def test_each_line_that_is_missing_is_named_and_added_again(trio: Path) -> None:
    complete = tree(trio)
    network = "      - {op: add, path: /build/artifacts/2/docker/network, value: none}"
    lacking = [
        (".dockerignore", f"!{NEWER}"),
        ("pyproject.toml", f'    "{NEWER}/",'),
        ("manifests/services/kustomization.yaml", f"  - ../{NEWER}"),
        ("skaffold.yaml", f"        - {NEWER}"),
        ("skaffold.yaml", f"{network}   # {NEWER}"),
    ]
    for file, line in lacking:
        text = (trio / file).read_text()
        assert text.count(f"{line}\n") == 1
        (trio / file).write_text(text.replace(f"{line}\n", ""))
    found = service(trio, "check")
    said = {f"{file} has no line for {NEWER}: {line.strip()}" for file, line in lacking}
    assert (found.returncode, {line.removeprefix("make: ") for line in found.stderr.splitlines()[:-1]}) == (1, said)
    assert "make service NAME=... adds an entry that is missing" in found.stderr
    assert service(trio, "add", NEWER, KUBECTL="true").returncode == 0
    assert tree(trio) == complete


def test_files_that_still_name_a_removed_service_are_listed(repository: Path) -> None:
    (repository / "note.txt").write_text(f"{NEW} is a service")
    assert service(repository, "add", NEW, KUBECTL="true").returncode == 0
    said = service(repository, "remove", NEW, **unusual() | {"KUBECTL": "true", "FORCE": "1"}).stdout
    assert "note.txt" in said.partition(f"\nThese files still name {NEW}: ")[2].split()


def test_line_that_an_entry_lacks_is_named(trio: Path) -> None:
    lines = [
        ("skaffold.yaml", "the entry", f"SERVICE: {NEWER}   # Skaffold ignores"),
        ("skaffold.yaml", "the entry", "localPort: 8082"),
        ("skaffold.yaml", "the entry", f"- {{src: {NEWER}/**, dest: /app}}"),
        ("compose.yaml", "the entry", f"args: {{<<: *build-args, SERVICE: {NEWER}}}"),
        ("compose.yaml", "the entry", f"REDIS_CA_FILE: /run/secrets/{NEWER}/ca.crt"),
        ("manifests/production/autoscaler.yaml", "the document", f"    name: {NEWER}"),
    ]
    for file, where, line in lines:
        whole = f"\n{line}\n" if where == "the document" else line
        edit(trio / file, whole, whole.replace(NEWER, FIRST).replace("8082", "8089"))
    before = tree(trio)
    for arguments in (("check",), ("add", NEWER)):
        found = service(trio, *arguments)
        assert found.returncode == 1
        for file, where, line in lines:
            assert f"{file} lacks a line in {where} of {NEWER}: {line.strip()}" in found.stderr
        assert found.stderr.count(" lacks a line in ") == len(lines)
    assert tree(trio) == before


def test_numbers_of_the_other_services_stay_when_one_is_removed(trio: Path) -> None:
    (trio / NEW / "new.py").touch()
    (trio / "tests" / NEW / "test_app.py").write_text("")
    before = tree(trio)
    refused = service(trio, "remove", NEW, **unusual() | {"KUBECTL": "true"})
    assert refused.returncode == 1
    assert refused.stderr.endswith(f"FORCE=1:\n M tests/{NEW}/test_app.py\n?? {NEW}/new.py\n")
    assert tree(trio) == before
    removed = service(trio, "remove", NEW, KUBECTL="true", FORCE="1")
    assert removed.returncode == 0
    assert all(text in removed.stdout for text in (f"Secret {NEW}-redis,", f"{{{NEW}}}:,", f".data/{NEW}/"))
    assert service(trio, "check").returncode == 0
    listed = script("services.sh", cwd=trio).stdout
    assert re.findall(r"^(\w+) +80(\d\d)", listed, re.MULTILINE) == [(FIRST, "80"), (NEWER, "82")]
    assert f"/build/artifacts/1/docker/target, value: dev}}   # {NEWER}" in (trio / "skaffold.yaml").read_text()
    assert service(trio, "add", NEW, KUBECTL="true").returncode == 0  # it gets the lowest number that is free
    listed = script("services.sh", cwd=trio).stdout
    assert re.findall(r"^(\w+) +80(\d\d)", listed, re.MULTILINE) == [(FIRST, "80"), (NEW, "81"), (NEWER, "82")]


def test_services_that_are_made_at_the_same_time_get_their_own_ports(repository: Path) -> None:
    command = [sys.executable, "scripts/service.py", "add"]
    environ = {**os.environ, "KUBECTL": "true"}
    both = [subprocess.Popen([*command, name], cwd=repository, env=environ, stdout=subprocess.DEVNULL) for name in (NEW, NEWER)]
    assert [process.wait(120) for process in both] == [0, 0]
    assert service(repository, "check").returncode == 0
    listed = script("services.sh", cwd=repository).stdout
    assert sorted(re.findall(r"^(\w+) +80", listed, re.MULTILINE)) == sorted((FIRST, NEW, NEWER))
    assert sorted(re.findall(r" (80\d\d) ", listed)) == ["8080", "8081", "8082"]


def test_file_that_is_edited_at_the_same_time_is_kept(repository: Path, tmp_path: Path) -> None:
    editing = tmp_path / "kubectl"
    editing.write_text(f"#!/bin/sh\necho '# edited' >>'{repository}/skaffold.yaml'\n")
    editing.chmod(0o755)
    before = tree(repository)
    refused = service(repository, "add", NEW, KUBECTL=str(editing))
    assert (refused.returncode, refused.stderr.count("skaffold.yaml\n")) == (1, 1), refused.stderr
    assert [name for name, content in tree(repository).items() if content != before.get(name)] == ["skaffold.yaml"]


def test_service_that_has_the_ports_of_another_gets_its_own(trio: Path) -> None:
    complete = tree(trio)
    # This is what two branches leave that each made one service.
    for file, port in (("manifests/minikube/kustomization.yaml", "3008"), ("skaffold.yaml", "808"), ("compose.yaml", ":-808")):
        edit(trio / file, f"{port}2", f"{port}1")
    twins = f"{NEWER} has the ports of {NEW}; to give {NEWER} ports of its own: make service NAME={NEWER}"
    assert twins in service(trio, "check").stderr
    assert service(trio, "add", NEWER, KUBECTL="true").returncode == 0
    assert tree(trio) == complete


@pytest.mark.chart
def test_new_service_is_in_the_chart(repository: Path) -> None:
    before = tree(repository)
    assert service(repository, "add", NEW).returncode == 0
    changed = {name for name, content in tree(repository).items() if name.startswith("chart/") and content != before.get(name)}
    assert {str(Path(name).parent) for name in changed} == {"chart/manifests"}  # no line was written for the service
    file = repository / "values.json"
    file.write_text(json.dumps({"services": {NEW: {"image": "x:1", "settings": {"LOG_LEVEL": "debug"}}}, "expose": "nodePort"}))
    text = helm("template", "it", str(repository / "chart"), f"--values={file}").stdout
    made = {(it["kind"], it["metadata"]["name"]): it for it in yaml.safe_load_all(text) if it}
    for kind in ("Deployment", "Service", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget"):
        assert {(kind, FIRST), (kind, NEW)} <= made.keys()
    (container,) = made["Deployment", NEW]["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "x:1"
    assert "annotations" in made["Deployment", NEW]["spec"]["template"]["metadata"]
    assert "annotations" not in made["Deployment", FIRST]["spec"]["template"]["metadata"]
    assert made["Service", NEW]["spec"]["ports"][0]["nodePort"] == 30081
    users = made["Secret", "redis-users"]["data"]
    assert made["Secret", f"{NEW}-redis"]["data"] == {"password": users[NEW]}
    asked = made["Job", "smoke-test"]["spec"]["template"]["spec"]["containers"][0]["args"][1:]
    assert asked == [FIRST, NEW]


# hitcounter: begin
def test_template_has_the_entries_of_the_example() -> None:
    found = spec_from_file_location("generator", ROOT / "scripts" / "service.py")
    assert found
    assert found.loader
    generator = module_from_spec(found)
    found.loader.exec_module(generator)
    for file in generator.LISTS:
        lines = (ROOT / file).read_text().splitlines()
        text, needed = generator.template(ROOT, file, lines, "hitcounter", 0)
        for head in generator.heads(needed):
            listed = lines[slice(*generator.extent(lines, generator.trails(lines)[head]))]
            assert file == generator.USERS or text[slice(*generator.extent(text, needed[head]))] == listed
    for file in generator.DOCUMENTS:
        text = (ROOT / generator.ENTRIES / file).read_text()
        assert generator.named(text, "hitcounter") == generator.document(ROOT / file, "hitcounter")


@pytest.mark.generator
def test_three_commands_make_the_repository_the_team_s_own(repository: Path) -> None:
    for arguments in (("add", "orders"), ("remove", "hitcounter"), ("rename-project", "shop")):
        ended = service(repository, *arguments)
        assert ended.returncode == 0, ended.stderr
    git(repository, "add", "--all")
    assert {name for name, content in tree(repository).items() if b"hitcounter" in content} <= {"CHANGELOG.md"}
    assert not (repository / "bench").exists()
    assert script("services.sh", "names", cwd=repository).stdout == "orders\n"
    rendered = list(yaml.safe_load_all((repository / "manifests" / "rendered" / "production.yaml").read_text()))
    assert {it["metadata"].get("namespace", it["metadata"]["name"]) for it in rendered} == {"shop"}
    images = [it["spec"]["template"]["spec"]["containers"][0]["image"] for it in rendered if it["kind"] == "Deployment"]
    assert images == [f"registry.example.com/shop/orders@sha256:{'0' * 64}"]
    assert re.findall(r"^(\w+) +(\d+)", script("services.sh", cwd=repository).stdout, re.MULTILINE) == [("orders", "8080")]
    assert "${ORDERS_PORT:-8080}" in (repository / "compose.yaml").read_text()
    assert yaml.safe_load((repository / "compose.yaml").read_text())["name"] == "shop"
    assert "sh install.sh" in (page := (repository / "docs" / "air-gap.md").read_text())
    assert set(re.findall(r"[\w.-]+-airgap", page)) == {"shop-0.1.0-airgap"}
    entries = repository / "scripts" / "template" / "entries"  # a service that is made later gets the new names, too
    assert "registry.example.com/shop/starter\n" in (entries / "manifests" / "production" / "kustomization.yaml").read_text()
    check(
        repository, "tests/orders", "tests/delivery/test_manifests.py", "tests/delivery/test_skaffold.py",
        "tests/delivery/test_texts.py", "tests/delivery/test_columns.py", "tests/delivery/test_deploy_played.py",
        "tests/delivery/test_workflows.py", "tests/delivery/test_scripts.py", "tests/delivery/test_chart.py",
        "tests/delivery/test_make.py::test_each_target_that_runs_tests_finds_some",
    )  # fmt: skip
    # No file names a file of the new service that only hitcounter had.
    named = {
        one for content in tree(repository).values() for one in re.findall(rb"\b(?:tests/)?orders/\w+\.(?:py|lua)\b", content)
    }
    assert {one.decode() for one in named} <= tree(repository).keys()
    # The texts describe the team's services, not the counts of hitcounter, and nothing is missing where a part was deleted.
    for name in (name for name in tree(repository) if name.endswith(".md") and name != "CHANGELOG.md"):
        text = (repository / name).read_text()
        assert re.findall(r"(?i)\bhits?\b|:posts\b|lost counts|idempotency-key|\blanes?\b|\bbatch", text) == [], name
        outside = re.sub(r"(?ms)^ *```.*?^ *```$", "a block", text)
        assert re.findall(r"(?m)^(?=(#+) )(.+)\n+(?=\Z|(?!\1#)#+ )", outside) == [], f"{name}: a heading has no text below it"
        assert re.findall(r"(?m)^ *\|[ |-]+\|\n(?! *\|)", outside) == [], f"{name}: a table has no rows"
        steps = [int(step) for step in re.findall(r"(?m)^(\d+)\. ", outside)]
        assert all(step in (1, last + 1) for last, step in zip([0, *steps], steps)), f"{name}: a step is missing"
    # The modules that only the tests of hitcounter used are gone.
    code = [content.decode() for name, content in tree(repository).items() if name.endswith(".py")]
    helpers = [path.stem for path in (repository / "tests" / "support").glob("[a-z]*.py")]
    assert [it for it in helpers if not any(re.search(rf"support(\.| import .*\b){it}\b", text) for text in code)] == []
    again = service(repository, "rename-project", "shop")
    assert again.stdout == "the project's name is shop already; nothing has changed\n"


LABEL = "a project's name is a DNS label"
UNUSABLE = {
    **dict.fromkeys(("", "Shop", "my_shop", "-shop", "shop-", "a" * 41), LABEL),
    **dict.fromkeys(("default", "kube-system"), "this namespace belongs to Kubernetes"),
    "true": "YAML reads this word as a value",
}


@pytest.mark.parametrize(("name", "words"), UNUSABLE.items())
def test_project_s_name_is_a_dns_label_and_not_taken(repository: Path, name: str, words: str) -> None:
    before = tree(repository)
    refused = service(repository, "rename-project", name)
    assert (refused.returncode, refused.stderr.count(words)) == (1, 1)
    assert tree(repository) == before


# hitcounter: end


# --- docs/second-service.md ---


CACHE = ROOT / ".mypy_cache"
# The tests whose result depends on the list of services, except for the new service's own tests.
LISTING = [
    *(f"tests/delivery/test_{name}.py" for name in ("manifests", "skaffold", "containerfile")),
    "tests/delivery/test_store.py::test_operator_loads_users_and_can_do_nothing_else",
    "-k 'not schema_of_each'",  # another test checks the schema, of ten services
]


def act(folder: Path, command: str, *tests: str) -> str:
    """Run a command of the page in `folder`, with the packages of this test's environment, and return its whole output.

    If the command runs pytest, it gets the arguments `tests`.
    """
    done = [f"{sys.prefix}/can-run", f"{sys.prefix}/installed"]
    # Without a cache, a type check takes half a minute. CI checks the types of a new service after those of the repository.
    done += [] if CACHE.exists() else ["types"]
    make = " -o ".join((f"make --no-print-directory VENV={sys.prefix}", *done))
    command = command.replace("make ", f"{make} ").replace(".venv/bin/", f"{sys.prefix}/bin/")
    outer = {name: text for name, text in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    # Several processes would only load the tests several times.
    environ = {**outer, "PYTEST_ADDOPTS": " ".join(("-p no:cacheprovider -p no:schemathesis --maxprocesses=1", *tests))}
    environ |= {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    environ |= {"GIT_CONFIG_GLOBAL": os.devnull}
    environ |= {"MYPY_CACHE_DIR": str(CACHE)}
    ended = subprocess.run(["bash", "-c", command], cwd=folder, env=environ, text=True, capture_output=True, timeout=600)
    assert ended.returncode == 0, f"{command}\n{ended.stdout}{ended.stderr}"
    return ended.stdout + ended.stderr


@contextlib.contextmanager
def running(folder: Path, command: str) -> Iterator[str]:
    """Run the command of the page that keeps running, yield the first line of its output, and stop it as Ctrl-C does."""
    environ = {**os.environ, "VENV": sys.prefix, "SERVICE": command.partition("SERVICE=")[2]}
    with subprocess.Popen(
        ["sh", "scripts/run.sh"], cwd=folder, env=environ, text=True, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        assert process.stdout
        try:
            yield process.stdout.readline()
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.communicate(timeout=30)


@pytest.mark.generator
def test_commands_of_the_page_make_a_complete_service_and_remove_it_completely(repository: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs" / "second-service.md").read_text().replace("likes", NEW))
    made, listed, served, asked, tested = steps(page, "On this machine")
    changed, completed, committed = steps(page, "Change what it does")
    (removed,) = steps(page, "How do I remove a service?")
    before = tree(repository)

    def follow(step: Step, *tests: str) -> None:
        began = time.monotonic()
        said = act(repository, step.command, *tests)
        print(f"{step.command}: {time.monotonic() - began:.1f} s")
        assert all(text in said for text in step.seen), said

    follow(made)
    complete = tree(repository)
    follow(listed)
    with running(repository, served.command) as line:
        assert all(text in line for text in served.seen)
        follow(asked)
    git(repository, "add", "--all")  # `make remove` and some tests see only the files that git knows
    follow(tested, f"tests/{NEW}", *LISTING)
    follow(changed, "-k returns")  # this command runs the same tests as the last one
    follow(completed)
    assert tree(repository) == complete
    follow(committed)
    follow(removed)
    assert tree(repository) == before


def test_person_opens_three_files_and_forty_lines_to_change_what_a_new_service_does() -> None:
    """The page names the three files. The number of lines is that of the code without blank lines, imports and docstrings."""
    page = (ROOT / "docs" / "second-service.md").read_text()
    opened = re.findall(r"^\| `((?:tests/)?likes/[\w.]+)` \|", page, re.MULTILINE)
    assert len(opened) == 3
    source = (ROOT / "scripts" / "template" / "starter" / "app.py").read_text()
    code = [line for line in source.splitlines() if line.strip() and not re.match(r'\s*(import|from|#|""")', line)]
    assert len(code) <= 40
