"""Make bundles for clusters without internet, and run their install.sh in a network without any route."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from nanoservice import __version__ as VERSION
from nanoservice.testing.waiting import wait_for
from tests.support import ROOT
from tests.support.images import WHEELS
from tests.support.services import project


def copy(folder: Path, version: str = VERSION) -> Path:
    """Copy the files that git knows into `folder`, and set the version. Return the folder."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in names:
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name, old in (("nanoservice/__init__.py", '__version__ = "{}"'), ("chart/Chart.yaml", "ersion: {}")):
        text = (folder / name).read_text()
        assert old.format(VERSION) in text
        (folder / name).write_text(text.replace(old.format(VERSION), old.format(version)))
    for command in (["init", "--quiet"], ["add", "--all", "--force"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def make(target: str, sources: Path, dist: Path, umask: int = 0o022, **environ: str) -> Path:
    """Run `make TARGET` in a folder, and return the file that it writes."""
    given = {"VENV": sys.prefix, "WHEELS": str(WHEELS), "DIST": str(dist), **environ}
    command = ["make", "--no-print-directory", target, *(f"{name}={value}" for name, value in given.items())]
    ended = subprocess.run(command, cwd=sources, capture_output=True, text=True, timeout=600, umask=umask)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    file = dist / f"{name_of(sources)}{'-bases' if target == 'bundle-bases' else ''}.tar"
    assert re.search(rf"(?m)^[0-9a-f]{{64}}  {re.escape(str(file))}$", ended.stdout)
    return file


def name_of(sources: Path) -> str:
    """Return the name of the folder that is in the bundle of these sources."""
    found = re.search('(?m)^__version__ = "(.+)"', (sources / "nanoservice" / "__init__.py").read_text())
    assert found
    return f"{project()}-{found[1]}-airgap"


def unpack(file: Path, folder: Path) -> Path:
    """Unpack a bundle into `folder`, and return the folder that is in it."""
    with tarfile.open(file) as tar:
        tar.extractall(folder, filter="data")
        return folder / Path(tar.getnames()[0]).parts[0]


class Island:
    """A network without any route, in which only the loopback address answers, and the servers in this network."""

    def __init__(self, folder: Path, tools: Path) -> None:
        self._folder = folder
        self._environ = {"PATH": f"{tools}:{os.environ['PATH']}", "HOME": str(folder)}
        self._stack = contextlib.ExitStack()
        script = "ip link set lo up && echo up && exec sleep 900"
        self._holder = self._stack.enter_context(
            subprocess.Popen(["unshare", "--net", "sh", "-c", script], stdout=subprocess.PIPE)
        )
        self._stack.callback(self._holder.kill)
        assert self._holder.stdout
        assert self._holder.stdout.readline() == b"up\n"

    def close(self) -> None:
        self._stack.close()

    def _inside(self, *command: str) -> list[str]:
        return ["nsenter", f"--net=/proc/{self._holder.pid}/ns/net", *command]

    def run(self, *command: str, cwd: Path | None = None, **environ: str) -> "subprocess.CompletedProcess[str]":
        """Run a command in this network, with its error output in its output."""
        given = self._environ | environ
        return subprocess.run(
            self._inside(*command), cwd=cwd, env=given, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=180
        )

    def start(self, name: str, *command: str, ready: Callable[[], bool]) -> Path:
        """Start a server, wait until it is ready, and return the file with its output."""
        log = self._folder / f"{name}.log"
        with log.open("w") as file:
            server = subprocess.Popen(self._inside(*command), stdout=file, stderr=file, env=self._environ)
        self._stack.callback(_stop, server)

        def works() -> bool:
            assert server.poll() is None, log.read_text()
            return ready()

        wait_for(works, 60, f"{name} answers: see {log}")
        return log

    def docker(self, name: str, containerd_store: bool) -> str:
        """Start a Docker daemon without images, and return the value of DOCKER_HOST for it."""
        folder = self._folder / name
        folder.mkdir()
        host = f"unix://{folder}/socket"
        (folder / "config.json").write_text(f'{{"features": {{"containerd-snapshotter": {str(containerd_store).lower()}}}}}')
        options = ["--bridge=none", "--iptables=false", "--ip6tables=false", f"--host={host}", f"--pidfile={folder}/pid"]
        options += [f"--config-file={folder}/config.json", f"--data-root={folder}/data", f"--exec-root={folder}/exec"]
        options += [] if containerd_store else ["--storage-driver=vfs"]
        self.start(name, "dockerd", *options, ready=lambda: self.run("docker", "version", DOCKER_HOST=host).returncode == 0)
        return host

    def containerd(self) -> str:
        """Start a containerd without images, and return the value of CONTAINERD_ADDRESS for it."""
        folder = self._folder / "containerd"
        folder.mkdir()
        address = f"{folder}/socket"
        command = ["containerd", f"--root={folder}/root", f"--state={folder}/state", f"--address={address}"]
        self.start("containerd", *command, ready=lambda: self.run("ctr", "version", CONTAINERD_ADDRESS=address).returncode == 0)
        return address

    def registry(self, port: int) -> tuple[str, Path]:
        """Start an empty registry, and return its address and its log."""
        config = self._folder / f"registry-{port}.yml"
        config.write_text(
            f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {self._folder}/registry-{port}}}}}\n"
            f"http: {{addr: 'localhost:{port}'}}\n"
        )
        ready = f"import urllib.request as u; u.urlopen('http://localhost:{port}/v2/', timeout=1)"
        log = self.start(
            f"registry-{port}",
            "docker-registry",
            "serve",
            str(config),
            ready=lambda: self.run(sys.executable, "-c", ready).returncode == 0,
        )
        return f"localhost:{port}", log


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait(10)


@contextlib.contextmanager
def replaced(file: Path, content: bytes | None) -> Iterator[None]:
    """Replace the content of a file, or with None remove the file; put it back after the block."""
    before = file.read_bytes() if file.exists() else None
    try:
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
        yield
    finally:
        if before is None:
            file.unlink()
        else:
            file.write_bytes(before)
