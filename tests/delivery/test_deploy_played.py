"""The make targets for Kubernetes handle rare answers of kubectl and of the container engine.

In these tests, shell scripts stand in for kubectl and for the engine.
"""

import functools
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.services import project


def played(folder: Path, name: str, script: str) -> str:
    """Write a shell script that appends its arguments to the file NAME.told and then runs `script`. Return the file's path."""
    program = folder / name
    program.write_text(f'#!/bin/sh\necho "$*" >>"$0.told"\n{script}\n')
    program.chmod(0o755)
    return str(program)


def copied(folder: Path) -> Path:
    """Copy the scripts, and the files that they read and write, into `folder`, with one service. Return the folder of scripts."""
    shutil.copytree(ROOT / "manifests", folder / "manifests", ignore=shutil.ignore_patterns(".*"))
    (folder / "manifests" / "minikube" / "kustomization.yaml").write_text(
        "  - target: {kind: Service, name: hitcounter}\n    patch: |-\n"
        "      - {op: add, path: /spec/ports/0/nodePort, value: 30080}\n"
    )
    (folder / "hitcounter").mkdir()
    (folder / "hitcounter" / "__main__.py").touch()
    return Path(shutil.copytree(ROOT / "scripts", folder / "scripts"))


def ran(script: str | Path, *arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    environ = {**os.environ, "NAMESPACE": "n", "REGISTRY": "r.example", "SERVICE": "", "VALKEY": "", **environ}
    path = ROOT / "scripts" / script
    command = ["sh", str(path), *arguments]
    return subprocess.run(command, cwd=path.parents[1], env=environ, capture_output=True, text=True, timeout=30)


def cluster(*, minor: int | None = 30, default: str = "true", nodes: str = "", label: str | None = None) -> str:
    """Return a script for a fake kubectl on a cluster with these properties. `label` is the label of the cluster's namespace."""
    version = f"""printf '{{"serverVersion": {{\\n "major": "1",\\n "minor": "{minor}",\\n "gitVersion": "v1"}}}}\\n'"""
    return f"""case "$*" in
  *version*) {"exit 1" if minor is None else version} ;;
  *storageclass*) echo "{default}" ;;
  *current-context*) echo elsewhere ;;
  *nodes*) echo {nodes} ;;
  *"get namespace"*) {":" if label is None else f"echo 'there {label}'"} ;;
esac"""


# --- make deploy, make undeploy ---


def check(folder: Path, registry: str = "r.example", **options: int | str | None) -> tuple[int, str]:
    """Run the check of `make deploy` on a fake cluster with these `options`. Return the check's exit status and error output."""
    kubectl, engine = played(folder, "kubectl", cluster(**options)), played(folder, "docker", "")  # type: ignore[arg-type]
    done = ran("deploy-check.sh", KUBECTL=kubectl, ENGINE=engine, REGISTRY=registry)
    return done.returncode, done.stderr


def test_suitable_cluster_passes_the_check_without_output(tmp_path: Path) -> None:
    assert check(tmp_path) == (0, "")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"minor": None}, "the cluster's version cannot be read (see above): start a cluster (minikube start)"),
        ({"minor": 29}, "the cluster is Kubernetes 1.29; 1.30 is the oldest"),
        ({"default": ""}, "no default storage class"),
        ({"registry": ""}, "gets the image from a registry; name yours: REGISTRY="),
    ],
    ids=["no cluster", "too old", "no storage class", "no registry"],
)
def test_unsuitable_cluster_is_refused_in_one_line(tmp_path: Path, options: dict[str, str], words: str) -> None:
    status, said = check(tmp_path, **options)
    assert status == 1
    assert words in said
    assert said.startswith("make: ")
    assert said.count("\n") == 1


@pytest.mark.parametrize("script", ["deploy-check", "secret", "secret-rotate", "backup", "restore", "undeploy"])
def test_kubectl_that_is_missing_is_named(script: str) -> None:
    done = ran(f"{script}.sh", KUBECTL="no-such-kubectl", FILE="Makefile")
    assert (done.returncode, done.stderr.startswith("make: kubectl is needed")) == (1, True)


def test_options_in_the_user_s_kuberc_are_not_taken(tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", f'[ "$KUBECTL_KUBERC" = false ] || exit 1\n{cluster()}')
    assert ran("deploy-check.sh", KUBECTL=kubectl, ENGINE=played(tmp_path, "docker", "")).returncode == 0


# For each call of kubectl that can fail: the script, the call, what the script says, and whether the script goes on.
FAILURES = [
    ("deploy-check", "version", "the cluster's version cannot be read (see above): start a cluster", False),
    ("deploy-check", "storageclass", "it is not known whether there is a default storage class", True),
    ("deploy-check", "get services", "it is not known whether another service has a node port", True),
    ("deploy-check", "get nodes", "it is not known what kind of cluster this is (see above); name the registry", False),
    ("deploy-check", "current-context", "it is not known what kind of cluster this is (see above); name the registry", False),
    ("deploy-check", "get namespace", "", False),
    ("secret", "get namespace", "", True),
    ("secret-rotate", "get pod redis-0", "", False),
    ("secret-rotate", "get statefulset", "", False),
    ("backup", "is-primary", "redis-2: You must be logged in", False),
]


@pytest.mark.parametrize(("script", "call", "advice", "goes_on"), FAILURES, ids=lambda it: it if isinstance(it, str) else "")
def test_failure_of_kubectl_is_no_answer_of_the_cluster(
    tmp_path: Path, script: str, call: str, advice: str, goes_on: bool
) -> None:
    """Each script shows what kubectl says, and claims nothing of the cluster that kubectl did not say."""
    fails = f'case "$*" in *"{call}"*) echo "You must be logged in" >&2; exit 1 ;; *"get statefulset"*) echo 3 ;; esac\n'
    kubectl, engine = played(tmp_path, "kubectl", fails + cluster()), played(tmp_path, "docker", "")
    registry = "" if advice.endswith("name the registry") else "r.example"
    ended = ran(f"{script}.sh", KUBECTL=kubectl, ENGINE=engine, REGISTRY=registry, FILE=str(tmp_path / "file"))
    assert "You must be logged in" in ended.stderr
    assert advice in ended.stderr
    assert not re.search("no cluster answers|there is no |has no |is neither", ended.stderr)
    assert (ended.returncode == 0) == goes_on


def test_namespace_that_does_not_exist_is_named_by_make_secret(tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", """echo 'Error from server (NotFound): namespaces "n" not found' >&2; exit 1""")
    ended = ran("secret.sh", KUBECTL=kubectl)
    assert ended.stderr == "make: there is no namespace n; run: kubectl apply --kustomize=manifests/namespace\n"


def test_cluster_without_a_context_is_deployed_to_through_a_registry(tmp_path: Path) -> None:
    """In a pod, kubectl has no configuration, and uses the pod's service account. With a time limit, it does not."""
    fails = """case "$*" in
      *current-context*) echo "error: current-context is not set" >&2; exit 1 ;;
      *request-timeout*) echo "The connection to the server localhost:8080 was refused" >&2; exit 1 ;;
    esac\n"""
    kubectl = played(tmp_path, "kubectl", fails + cluster())
    engine = played(tmp_path, "docker", "case $* in *inspect*) echo sha256:123456789012abcdef ;; esac")
    scripts = copied(tmp_path)
    for script in ("deploy-check", "deploy"):
        ended = ran(scripts / f"{script}.sh", KUBECTL=kubectl, ENGINE=engine, KUBERNETES_SERVICE_HOST="10.96.0.1")
        assert (ended.returncode, "current-context" in ended.stderr) == (0, False), ended.stderr


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ("n hitcounter 30080\nother headless \nother web 80 30081\n", ""),
        (
            "other web 30443 30080\n",
            "hitcounter needs the node port 30080, which belongs to the service web in the namespace other",
        ),
        ("n web 30080\n", "hitcounter needs the node port 30080, which belongs to the service web in the namespace n"),
    ],
    ids=["free", "another namespace", "another service"],
)
def test_node_port_of_another_service_is_named_before_anything_is_built(tmp_path: Path, others: str, said: str) -> None:
    kubectl = played(tmp_path, "kubectl", f'case "$*" in *"get services"*) printf "{others}"; exit ;; esac\n{cluster()}')
    ended = ran(copied(tmp_path) / "deploy-check.sh", KUBECTL=kubectl, ENGINE=played(tmp_path, "docker", ""))
    assert (ended.returncode, said in ended.stderr) == (1 if said else 0, True), ended.stderr
    assert ended.stderr.count("\n") == bool(said)


@pytest.mark.parametrize(
    ("addresses", "printed"),
    [
        ("echo 172.18.0.2 fc00:f853::2", "http://172.18.0.2:30080/"),
        ("echo fc00:f853::2 172.18.0.2", "http://[fc00:f853::2]:30080/"),
        ("exit 1", "kubectl --namespace=n port-forward service/hitcounter 8080:80"),
        (":", "kubectl --namespace=n port-forward service/hitcounter 8080:80"),
    ],
    ids=["dual stack", "IPv6", "forbidden", "no address"],
)
def test_deploy_prints_one_url_or_how_to_get_one(tmp_path: Path, addresses: str, printed: str) -> None:
    kubectl = played(tmp_path, "kubectl", f"case $* in *addresses*) {addresses} ;; *nodePort*) echo 30080 ;; esac")
    engine = played(tmp_path, "docker", "case $* in *inspect*) echo sha256:123456789012abcdef ;; esac")
    ended = ran(copied(tmp_path) / "deploy.sh", KUBECTL=kubectl, ENGINE=engine)
    assert (ended.returncode, ended.stdout) == (0, f"{printed}\n"), ended.stderr


def test_docker_says_itself_why_it_cannot_be_used(tmp_path: Path) -> None:
    fails = 'case "$*" in "buildx version") echo github.com/docker/buildx ;; *) echo permission denied >&2; exit 1 ;; esac'
    played(tmp_path, "docker", fails)
    kubectl = played(tmp_path, "kubectl", cluster(nodes="node/minikube"))
    for name in ("sh", "sed", "tr", "grep", "awk", "sort", "cut", "cat", "head"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    for advice in ("an image needs an engine", "minikube takes images from Docker, not from podman"):
        ended = ran("deploy-check.sh", KUBECTL=kubectl, ENGINE="", REGISTRY="", PATH=str(tmp_path))
        assert "permission denied" in ended.stderr
        assert advice in ended.stderr
        played(tmp_path, "podman", "")


def test_engine_whose_images_minikube_cannot_load_is_refused(tmp_path: Path) -> None:
    kubectl = played(tmp_path, "kubectl", cluster(nodes="node/minikube"))
    for name, status in (("docker", 0), ("podman", 1), ("buildah", 1)):
        engine = played(tmp_path, name, "")
        ended = ran("deploy-check.sh", KUBECTL=kubectl, ENGINE=engine, REGISTRY="")
        assert (ended.returncode, f"minikube takes images from Docker, not from {name}" in ended.stderr) == (status, bool(status))
        assert ran("deploy-check.sh", KUBECTL=kubectl, ENGINE=engine).returncode == 0


@pytest.mark.parametrize("command", ["deploy-check", "deploy", "undeploy"])
@pytest.mark.parametrize(("label", "taken"), [(project(), True), ("", False), ("another", False)])
def test_foreign_namespace_is_left_alone(tmp_path: Path, command: str, label: str, taken: bool) -> None:
    kubectl = played(tmp_path, "kubectl", cluster(label=label))
    ended = ran(copied(tmp_path) / f"{command}.sh", KUBECTL=kubectl, ENGINE=played(tmp_path, "docker", ""))
    told = (tmp_path / "kubectl.told").read_text()
    assert ended.returncode == (0 if taken else 1), ended.stderr
    assert ("the namespace n is not this service's" in ended.stderr) != taken
    assert ("apply" in told) == (taken and command == "deploy")
    assert ("delete" in told) == (taken and command == "undeploy")


def test_names_that_look_like_numbers_stay_texts(tmp_path: Path) -> None:
    """A tag is the beginning of a digest. One tag in some hundreds looks like a number: `123456789012` or `12345678e123`."""
    keeps = 'for word; do case $word in --kustomize=*) cp "${word#*=}"/*.yaml "$0.yaml" ;; esac; done'
    kubectl = played(tmp_path, "kubectl", keeps)
    engine = played(tmp_path, "docker", "case $* in *inspect*) echo sha256:123456789012abcdef ;; esac")
    ended = ran(copied(tmp_path) / "deploy.sh", KUBECTL=kubectl, ENGINE=engine, NAMESPACE="2024", VALKEY="r.example/valkey:9")
    assert ended.returncode == 0, ended.stderr
    written = yaml.safe_load((tmp_path / "kubectl.yaml").read_text())
    assert written["namespace"] == "2024"
    assert written["images"] == [
        {"name": "hitcounter", "newName": "r.example/hitcounter", "newTag": "123456789012"},
        {"name": "docker.io/valkey/valkey", "newName": "r.example/valkey", "newTag": "9"},
    ]


def test_deploy_of_one_service_applies_nothing_of_another(tmp_path: Path) -> None:
    keeps = 'for word; do case $word in --kustomize=*) cp "${word#*=}"/*.yaml "$0.yaml" ;; esac; done'
    ports = '*"likes "*nodePort*) echo 30081 ;; *nodePort*) echo 30080 ;;'
    kubectl = played(tmp_path, "kubectl", f"{keeps}; case $* in *addresses*) echo 10.0.0.1 ;; {ports} esac")
    engine = played(tmp_path, "docker", "case $* in *inspect*) echo sha256:123456789012abcdef ;; esac")
    scripts = copied(tmp_path)
    (tmp_path / "likes").mkdir()
    (tmp_path / "likes" / "__main__.py").touch()
    with (tmp_path / "manifests" / "minikube" / "kustomization.yaml").open("a") as file:
        file.write("  - target: {kind: Service, name: likes}\n    patch: |-\n")
        file.write("      - {op: add, path: /spec/ports/0/nodePort, value: 30081}\n")

    def deploy(**environ: str) -> tuple[str, str, list[str]]:
        """Return the output, the arguments of `kubectl apply`, and the images that are deployed."""
        (tmp_path / "kubectl.told").unlink(missing_ok=True)
        ended = ran(scripts / "deploy.sh", KUBECTL=kubectl, ENGINE=engine, **environ)
        assert ended.returncode == 0, ended.stderr
        (applied,) = re.findall("apply .*--kustomize.*", (tmp_path / "kubectl.told").read_text())
        images = yaml.safe_load((tmp_path / "kubectl.yaml").read_text())["images"]
        return ended.stdout, applied, [image["name"] for image in images]

    said, applied, images = deploy(SERVICE="likes")
    assert said == "http://10.0.0.1:30081/\n"
    assert applied.endswith("--selector=app.kubernetes.io/name notin (hitcounter)")
    assert images == ["likes"]
    said, applied, images = deploy()
    assert said == "http://10.0.0.1:30080/ hitcounter\nhttp://10.0.0.1:30081/ likes\n"
    assert "--selector" not in applied
    assert images == ["hitcounter", "likes"]


# For each component, what the look-ups of `make deploy` answer on a cluster that needs it.
NEEDS = {
    "openshift": {"api-versions": "route.openshift.io/v1\nsecurity.openshift.io/v1"},
    "dns-gke": {" version": "Client Version: v1.32.4-dispatcher\nServer Version: v1.33.4-gke.1245000"},
    "dns-gardener": {"endpointslices": "9153 8053 8053"},
    "dns-kubespray": {"daemonsets": 'calico-node true \nnodelocaldns true ["-localip","169.254.25.10"]'},
    "dns-cilium": {"daemonsets": 'cilium true \nnode-local-dns  ["-localip","169.254.20.10,10.96.0.10"]'},
    # The manifests allow the DNS of such a cluster without a component.
    "": {
        "api-versions": "apps/v1\nv1",
        " version": "Client Version: v1.32.4-gke.1\nServer Version: v1.33.4+k3s1",
        "endpointslices": "53 53 9153",
        "daemonsets": 'node-local-dns true ["-localip","169.254.20.10,10.96.0.10"]',
    },
}


@pytest.mark.parametrize("already", [False, True], ids=["", "in the variant"])
@pytest.mark.parametrize("component", NEEDS)
def test_deploy_adds_the_component_that_the_cluster_needs_and_names_it(tmp_path: Path, component: str, already: bool) -> None:
    answers = "".join(f"*'{words}'*) echo '{answer}' ;; " for words, answer in NEEDS[component].items())
    keeps = 'for word; do case $word in --kustomize=*) cp "${word#*=}"/*.yaml "$0.yaml" ;; esac; done'
    # A user who may not look into `kube-system` can deploy too, so all other look-ups there fail.
    kubectl = played(tmp_path, "kubectl", f"{keeps}; case $* in {answers} *kube-system* | *version*) echo no >&2; exit 1 ;; esac")
    engine = played(tmp_path, "docker", "case $* in *inspect*) echo sha256:123456789012abcdef ;; esac")
    scripts = copied(tmp_path)
    with (tmp_path / "manifests" / "minikube" / "kustomization.yaml").open("a") as file:
        file.write(f"components:\n{' ' if already else '#'}  - ../components/{component}\n")
    ended = ran(scripts / "deploy.sh", KUBECTL=kubectl, ENGINE=engine)
    assert ended.returncode == 0, ended.stderr
    assert re.findall(r"^make: this cluster needs the component (\S+),", ended.stderr, re.MULTILINE) == [component] * bool(
        component
    )
    written = yaml.safe_load((tmp_path / "kubectl.yaml").read_text())["components"]
    assert written == (None if already or not component else [f"../components/{component}"])


def test_deploy_knows_a_sign_of_every_component_that_depends_on_the_cluster() -> None:
    components = {path.name for path in (ROOT / "manifests" / "components").iterdir()}
    assert NEEDS.keys() - {""} == {name for name in components if not name.startswith(("redis", "monitoring"))}


def test_dry_run_of_deploy_calls_nothing(tmp_path: Path) -> None:
    kubectl, engine = played(tmp_path, "kubectl", ""), played(tmp_path, "docker", "")
    command = ["make", "--dry-run", "deploy", f"KUBECTL={kubectl}", f"ENGINE={engine}", "REGISTRY=r.example"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=30).stdout
    assert "scripts/deploy.sh" in shown
    # Neither docker nor kubectl was called: the fake programs write a file NAME.told when they are called.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["docker", "kubectl"]


# --- make secret, make secret-rotate ---


REPLICATED = {"probe", "operator", "replica", "sentinel"}  # the users that the component redis-replicated names


class Cluster:
    """A copy of the scripts with a users.acl of its own, and a fake kubectl.

    `users` is the content of users.acl. `has` maps SECRET.KEY to the content of each key that the fake cluster already has.
    """

    # The fake kubectl answers with the contents in `has`. When a script writes a secret, the fake kubectl makes a folder with the
    # secret's name, and a file in this folder for each key.
    _KUBECTL = """case $* in
      *"get secret"*)
        key=$(expr "x$*" : '.*index \\. "\\([a-z]*\\)"')
        [ ! -e "$0.has/$5.$key" ] || cat "$0.has/$5.$key"
        ;;
      *"create secret generic"*)
        rm -rf "$0.got/$6" && mkdir -p "$0.got"
        for word; do case $word in --from-file=*) cp -R "${word#*=}" "$0.got/$6" ;; esac; done
        ;;
      *"get statefulset redis"*) echo 1 ;;
      *"get pod redis-0"*jsonpath*) echo redis ;;
      *"get deployment hitcounter"*) echo deployment.apps/hitcounter ;;
      *"exec redis-0"*"cat "*) cd "$0.got/redis-users" && shift 10 && cat "$@" ;;
    esac"""

    def __init__(self, folder: Path, users: str, has: dict[str, str]) -> None:
        self.scripts = copied(folder)
        (folder / "manifests" / "redis" / "users.acl").write_text(users)
        self.kubectl = played(folder, "kubectl", self._KUBECTL)
        (folder / "kubectl.has").mkdir()
        for name, content in has.items():
            (folder / "kubectl.has" / name).write_text(content)
        self.got = folder / "kubectl.got"
        self.told = folder / "kubectl.told"

    def run(self, command: str, **environ: str) -> "subprocess.CompletedProcess[str]":
        return ran(self.scripts / f"{command}.sh", KUBECTL=self.kubectl, **environ)

    def written(self) -> dict[str, dict[str, str]]:
        """Return the secrets that a script has written, as a dict from the secret's name to its keys and values."""
        return {secret.name: {key.name: key.read_text() for key in secret.iterdir()} for secret in self.got.iterdir()}


@pytest.mark.parametrize(("status", "written"), [(0, True), (1, False)], ids=["no secret", "an error"])
def test_passwords_are_made_only_if_the_cluster_has_none(tmp_path: Path, status: int, written: bool) -> None:
    kubectl = played(tmp_path, "kubectl", f"case $* in *'get secret'*) exit {status} ;; esac")
    assert ran("secret.sh", KUBECTL=kubectl).returncode == status
    assert ("create secret" in (tmp_path / "kubectl.told").read_text()) == written


def test_existing_password_of_a_service_stays(tmp_path: Path) -> None:
    """A password can exist without the secret `redis-users`: for a Redis outside the cluster, or if the secret was deleted."""
    users = "user default off\nuser hitcounter +get\nuser probe +ping\n"
    one = Cluster(tmp_path, users, {"hitcounter-redis.password": "theirs"})
    assert one.run("secret").returncode == 0
    written = one.written()
    assert written.keys() == {"redis-users"}
    assert written["redis-users"]["hitcounter"] == "theirs\n"
    assert re.fullmatch("[0-9a-f]{64}\n", written["redis-users"]["probe"])


def test_secret_that_has_only_line_ends_has_no_password_and_a_carriage_return_is_not_part_of_one(tmp_path: Path) -> None:
    has = {
        "redis-users.hitcounter": "\ufeffnew\r\nold\r\n",
        "redis-users.probe": "\ufeff\r\n",
        "hitcounter-redis.password": "other",
    }
    one = Cluster(tmp_path, "user hitcounter +get\nuser probe +ping\n", has)
    assert one.run("secret").returncode == 0
    written = one.written()
    assert written["redis-users"]["hitcounter"] == "new\nold\n"
    assert written["hitcounter-redis"] == {"password": "new\n"}
    assert re.fullmatch("[0-9a-f]{64}\n", written["redis-users"]["probe"])


def test_each_service_gets_its_own_password_whatever_its_name(tmp_path: Path) -> None:
    names = ["users", "new", "read", "services", "wanted", "last"]
    # The script must also read a users.acl that begins with a comment, and whose last line has no newline.
    one = Cluster(tmp_path, "# of all\nuser default off\n" + "\n".join(f"user {name} +get" for name in names), {})
    assert one.run("secret").returncode == 0
    written = one.written()
    passwords = written.pop("redis-users")
    assert passwords.keys() == {*names, *REPLICATED}
    assert written == {f"{name}-redis": {"password": passwords[name]} for name in names}
    assert len(set(passwords.values())) == len(passwords)


def test_rotation_does_not_wait_for_a_service_that_is_not_deployed(tmp_path: Path) -> None:
    has = {f"redis-users.{name}": f"{name}\n" for name in ("hitcounter", "second", *REPLICATED)}
    one = Cluster(tmp_path, "user hitcounter +get\nuser second +get\n", has)
    ended = one.run("secret-rotate")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith("Redis accepts the new passwords only\n")
    assert re.findall("rollout restart (.+)", one.told.read_text()) == ["deployment/hitcounter"]


def test_rotation_of_one_service_changes_no_other_password_and_replaces_no_other_pod(tmp_path: Path) -> None:
    has = {f"redis-users.{name}": f"{name}\n" for name in ("hitcounter", "second", *REPLICATED)}
    has |= {"hitcounter-redis.password": "hitcounter", "second-redis.password": "second"}
    one = Cluster(tmp_path, "user hitcounter +get\nuser second +get\nuser probe +ping\n", has)
    ended = one.run("secret-rotate", SERVICE="hitcounter")
    assert ended.returncode == 0, ended.stderr
    written = one.written()
    assert written.keys() == {"redis-users", "hitcounter-redis"}
    rotated = written["redis-users"].pop("hitcounter")
    assert rotated == written["hitcounter-redis"]["password"] != "hitcounter\n"
    assert written["redis-users"] == {name: f"{name}\n" for name in ("second", *REPLICATED)}
    assert re.findall("rollout restart (.+)", one.told.read_text()) == ["deployment/hitcounter"]
    assert "has no user of this name" in one.run("secret-rotate", SERVICE="third").stderr


def test_rotation_of_one_service_writes_no_empty_password_of_another(tmp_path: Path) -> None:
    one = Cluster(tmp_path, "user hitcounter +get\nuser second +get\n", {"redis-users.hitcounter": "hitcounter\n"})
    assert "has no password for second; run: make secret" in one.run("secret-rotate", SERVICE="hitcounter").stderr
    assert not one.got.exists()


def test_temporary_passwords_are_deleted_when_the_terminal_closes(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    kubectl = played(tmp_path, "kubectl", 'case $* in *"get secret"*) echo >"$0.waits"; sleep 60 ;; esac')
    environ = {**os.environ, "NAMESPACE": "n", "KUBECTL": kubectl, "TMPDIR": str(temporary)}
    command = ["sh", "scripts/secret.sh"]
    # Restore the default action of SIGHUP: if these tests run under nohup, their child processes would ignore SIGHUP.
    heeded = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, env=environ, start_new_session=True, preexec_fn=heeded) as popen:
        wait_for((tmp_path / "kubectl.waits").exists, 10 * SLACK)
        assert list(temporary.iterdir())
        os.killpg(popen.pid, signal.SIGHUP)
        assert popen.wait(10 * SLACK) != 0
    assert not list(temporary.iterdir())


# --- make backup, make manifests ---


@pytest.mark.parametrize(("end", "whole"), [("", True), ("| head -c 40", False)], ids=["whole", "cut off"])
def test_backup_that_is_interrupted_replaces_no_file(tmp_path: Path, end: str, whole: bool) -> None:
    """kubectl succeeds even if the stream from the pod ends early, so the script itself must notice an incomplete backup."""
    file = tmp_path / "backup.rdb"
    file.write_text("yesterday's")
    snapshot = f"seq 2000 | gzip -c {end}"
    kubectl = played(tmp_path, "kubectl", f'case "$*" in *"get statefulset"*) echo 1 ;; *) {snapshot} ;; esac')
    command = ["make", "backup", f"FILE={file}", f"KUBECTL={kubectl}"]
    assert (subprocess.run(command, cwd=ROOT, capture_output=True, timeout=30).returncode == 0) == whole
    assert file.read_text() == ("".join(f"{number}\n" for number in range(1, 2001)) if whole else "yesterday's")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backup.rdb", "kubectl", "kubectl.told"]


def test_rendered_manifests_stay_if_rendering_fails(tmp_path: Path) -> None:
    script, rendered = copied(tmp_path) / "manifests.sh", tmp_path / "manifests" / "rendered"
    before = {path.name: path.read_text() for path in rendered.iterdir()}
    for kubectl in (played(tmp_path, "kubectl", "exit 1"), "no-such-kubectl"):
        assert ran(script, str(rendered), KUBECTL=kubectl).returncode != 0
        assert {path.name: path.read_text() for path in rendered.iterdir()} == before
