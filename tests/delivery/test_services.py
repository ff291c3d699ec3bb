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
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.git import ENVIRON, unusual
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
        ["c", "8080", "9090", "5678", "30080"],
        ["a", "8081", "9091", "5679", "30081"],
    ]
    assert script("services.sh", "names", cwd=three).stdout.split() == ["b", "c", "a"]
    assert script("services.sh", "json", cwd=three).stdout == 'services=["b","c","a"]\n'


def test_tests_know_the_services_that_make_knows() -> None:
    assert sorted(names()) == sorted(path.parent.name for path in ROOT.glob("*/__main__.py"))


def test_script_runs_for_each_service_or_for_the_one_that_is_named(three: Path) -> None:
    (three / "scripts" / "tell.sh").write_text('echo "$SERVICE $IMAGE $LAYOUT"\n[ "$SERVICE" != c ]\n')
    one = script("each.sh", "tell.sh", cwd=three, SERVICE="a", IMAGE="x")
    assert (one.returncode, one.stdout) == (0, "a x a.oci\n")
    every = script("each.sh", "tell.sh", cwd=three)
    assert (every.returncode, every.stdout) == (1, "b b b.oci\nc c c.oci\n")  # a failure stops the rest


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SERVICE": "d"}, "SERVICE=d: the services are b c a; to make another: make service NAME=..."),
        ({"IMAGE": "x"}, "IMAGE= and LAYOUT= name one image, so say of which service: SERVICE=..."),
        ({"LAYOUT": "x"}, "IMAGE= and LAYOUT= name one image, so say of which service: SERVICE=..."),
    ],
    ids=["unknown", "image", "layout"],
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
        assert service(folder, "remove", name).returncode == 0
    commit(folder)
    return folder


@pytest.fixture
def repository(clone: Path) -> Iterator[Path]:
    """Yield the folder `clone`, and afterwards remove everything that the test changed there."""
    yield clone
    git(clone, "reset", "--quiet", "--hard", "one")
    git(clone, "clean", "--quiet", "-dfx")


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", f"safe.directory={folder}", "-c", "core.hooksPath=/dev/null"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], env=ENVIRON, check=True, text=True, capture_output=True
    ).stdout


def commit(folder: Path) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=one")
    git(folder, "tag", "one")


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


def test_ten_services_have_ten_of_everything(repository: Path) -> None:
    made = [f"made{letter}" for letter in "zyxwvutsr"]
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
    services = yaml.safe_load((repository / "compose.yaml").read_text())["services"]
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
        ("class", "this is a word of Python"),
        ("json", "Python's standard library has a module of this name"),
        ("aiohttp", "an installed package has this name"),
        ("redis", "manifests/redis/ exists already, and is not a service"),
        ("support", "tests/support/ exists already, and is not a service"),
        ("nanoservice", "nanoservice/ exists already, and is not a service"),
        ("operator", "Python's standard library has a module of this name"),
        ("probe", "manifests/redis/users.acl has a user of this name already"),
        ("dist", ".gitignore names this folder"),
    ],
)
def test_name_that_cannot_be_used_is_refused_with_the_reason(repository: Path, name: str, words: str) -> None:
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


def test_each_line_that_is_missing_is_named_and_added_again(repository: Path) -> None:
    assert service(repository, "add", NEW, KUBECTL="true").returncode == 0  # this test needs no rendered manifests
    complete = tree(repository)
    network = "      - {op: add, path: /build/artifacts/1/docker/network, value: none}"
    lacking = [
        (".dockerignore", f"!{NEW}"),
        ("pyproject.toml", f'    "{NEW}/",'),
        ("manifests/services/kustomization.yaml", f"  - ../{NEW}"),
        ("skaffold.yaml", f"        - {NEW}"),
        ("skaffold.yaml", f"{network}   # {NEW}"),
    ]
    for file, line in lacking:
        text = (repository / file).read_text()
        assert text.count(f"{line}\n") == 1
        (repository / file).write_text(text.replace(f"{line}\n", ""))
    found = service(repository, "check")
    said = {f"{file} has no line for {NEW}: {line.strip().replace('artifacts/1', 'artifacts/N')}" for file, line in lacking}
    assert (found.returncode, {line.removeprefix("make: ") for line in found.stderr.splitlines()[:-1]}) == (1, said)
    assert "make service NAME=... adds what is missing" in found.stderr
    assert service(repository, "add", NEW, KUBECTL="true").returncode == 0
    assert tree(repository) == complete


def test_files_that_still_name_a_removed_service_are_listed(repository: Path) -> None:
    (repository / "note.txt").write_text(f"{NEW} is a service")
    assert service(repository, "add", NEW, KUBECTL="true").returncode == 0
    said = service(repository, "remove", NEW, **{**unusual(), "KUBECTL": "true"}).stdout
    assert "note.txt" in said.partition(f"\nThese files still name {NEW}: ")[2].split()


def test_numbers_of_the_other_services_stay_when_one_is_removed(repository: Path) -> None:
    for name in (NEW, NEWER):
        assert service(repository, "add", name, KUBECTL="true").returncode == 0
    assert service(repository, "remove", NEW, KUBECTL="true").returncode == 0
    assert service(repository, "check").returncode == 0
    listed = script("services.sh", cwd=repository).stdout
    assert re.findall(r"^(\w+) +80(\d\d)", listed, re.MULTILINE) == [(FIRST, "80"), (NEWER, "82")]
    assert f"/build/artifacts/1/docker/target, value: dev}}   # {NEWER}" in (repository / "skaffold.yaml").read_text()
    assert service(repository, "add", NEW, KUBECTL="true").returncode == 0  # it gets the lowest number that is free
    listed = script("services.sh", cwd=repository).stdout
    assert re.findall(r"^(\w+) +80(\d\d)", listed, re.MULTILINE) == [(FIRST, "80"), (NEW, "81"), (NEWER, "82")]


# hitcounter: begin
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
    check(
        repository, "tests/orders", "tests/delivery/test_manifests.py", "tests/delivery/test_skaffold.py",
        "tests/delivery/test_texts.py", "tests/delivery/test_columns.py", "tests/delivery/test_deploy_played.py",
        "tests/delivery/test_workflows.py", "tests/delivery/test_scripts.py",
        "tests/delivery/test_make.py::test_each_target_that_runs_tests_finds_some",
    )  # fmt: skip
    # No file names a file of the new service that only hitcounter had.
    named = {
        one for content in tree(repository).values() for one in re.findall(rb"\b(?:tests/)?orders/\w+\.(?:py|lua)\b", content)
    }
    assert {one.decode() for one in named} <= tree(repository).keys()
    again = service(repository, "rename-project", "shop")
    assert again.stdout == "the project's name is shop already; nothing has changed\n"


@pytest.mark.parametrize("name", ["", "Shop", "my_shop", "-shop", "shop-", "a" * 41])
def test_project_s_name_is_a_dns_label(repository: Path, name: str) -> None:
    before = tree(repository)
    refused = service(repository, "rename-project", name)
    assert (refused.returncode, refused.stderr.count("a project's name is a DNS label")) == (1, 1)
    assert tree(repository) == before


# hitcounter: end


# --- docs/second-service.md ---


CACHE = ROOT / ".mypy_cache"
# The tests whose result depends on the list of services, besides the new service's own.
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
    """The page names the three files. The lines are those of the code that are neither blank, imports nor docstrings."""
    page = (ROOT / "docs" / "second-service.md").read_text()
    opened = re.findall(r"^\| `((?:tests/)?likes/[\w.]+)` \|", page, re.MULTILINE)
    assert len(opened) == 3
    source = (ROOT / "scripts" / "template" / "starter" / "app.py").read_text()
    code = [line for line in source.splitlines() if line.strip() and not re.match(r'\s*(import|from|#|""")', line)]
    assert len(code) <= 40
