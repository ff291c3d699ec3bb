"""The reloader restarts the service when a file changes; the reloader and the service stop together."""

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from nanoservice.testing.valkey import Valkey, free_port
from nanoservice.testing.waiting import SLACK, eventually, wait_for
from tests.support import ROOT
from tests.support.loops import python_path

SERVICE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({status}))
print("runs {word}", os.environ["DRAIN_SECONDS"], flush=True)
while True:
    time.sleep(0.01)
"""


ASKED_ONCE = """
import os, signal, time
def end(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(3))
    print("ends", flush=True)
    time.sleep(0.5)
    os._exit(0)
signal.signal(signal.SIGTERM, end)
signal.signal(signal.SIGINT, end)
print("runs", flush=True)
while True:
    time.sleep(0.01)
"""

LISTENS = """
import os, sys
from nanoservice.config import Config
from nanoservice.server import main
from nanoservice.service import Service
sys.exit(main(Service("thing", "1", Config, lambda app, config: None), os.environ, []))
"""

# This program runs a command, and makes standard input the controlling terminal of the command.
ON_TERMINAL = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Reloader:
    """A reloader that runs in a folder with a copy of the chassis and a package called `thing`."""

    def __init__(self, folder: Path) -> None:
        shutil.copytree(ROOT / "nanoservice", folder / "nanoservice", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "thing").mkdir()
        (folder / "thing" / "__init__.py").touch()
        self.file = folder / "thing" / "__main__.py"
        self.folder = folder
        self.output = folder / "output"

    def start(self, terminal: int | None = None, **environ: str) -> "subprocess.Popen[bytes]":
        environ = {**os.environ, "PYTHONPATH": python_path(), "DRAIN_SECONDS": "5", "PYTHONDONTWRITEBYTECODE": "1", **environ}
        command = [sys.executable, "-m", "nanoservice.reload", "-m", "thing"]
        if terminal is not None:
            command = [sys.executable, "-c", ON_TERMINAL, *command]
        with self.output.open("wb") as output:
            self.popen = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environ,
                stdin=terminal,
                stdout=output,
                stderr=output,
                start_new_session=terminal is not None,
            )
        return self.popen

    def says(self, text: str) -> None:
        wait_for(lambda: text in self.output.read_text(), 5 * SLACK, text)


@pytest.fixture
def reloader(tmp_path: Path) -> Iterator[Reloader]:
    it = Reloader(tmp_path)
    yield it
    it.popen.terminate()  # SIGKILL would leave the service running
    it.popen.wait(30)


def test_change_restarts_the_service_without_a_drain(reloader: Reloader) -> None:
    reloader.file.write_text(SERVICE.format(word="one", status=0))
    popen = reloader.start()
    reloader.says("runs one 0")
    reloader.file.write_text(SERVICE.format(word="two", status=0))
    reloader.says("runs two 0")
    (reloader.folder / "nanoservice" / "new.json").touch()
    wait_for(lambda: reloader.output.read_text().count("runs two") >= 2, 5 * SLACK)
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(5 * SLACK) == 0


def test_reloader_waits_for_a_change_after_a_syntax_error(reloader: Reloader) -> None:
    reloader.file.write_text("print('one'\n")
    popen = reloader.start()
    reloader.says("SyntaxError")
    reloader.file.write_text(SERVICE.format(word="two", status=3))
    reloader.says("runs two")
    popen.send_signal(signal.SIGINT)
    assert popen.wait(5 * SLACK) == 3


def test_bad_settings_stop_the_reloader(reloader: Reloader) -> None:
    reloader.file.write_text(f"raise SystemExit({os.EX_CONFIG})")
    assert reloader.start().wait(5 * SLACK) == os.EX_CONFIG


def test_service_that_does_not_hear_signals_is_killed(reloader: Reloader) -> None:
    code = reloader.folder / "nanoservice" / "reload.py"
    code.write_text(code.read_text().replace("_STOP_SECONDS = 20.0", "_STOP_SECONDS = 1.0"))
    deaf = SERVICE.format(word="one", status=0).replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")
    reloader.file.write_text(deaf)
    popen = reloader.start()
    reloader.says("runs one")
    reloader.file.write_text(deaf.replace("one", "two"))
    reloader.says("runs two")
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(5 * SLACK) == -signal.SIGKILL % 256


async def test_request_between_two_runs_waits_for_the_next_run(reloader: Reloader, valkey: Valkey) -> None:
    reloader.file.write_text(LISTENS)
    port = free_port()
    popen = reloader.start(None, **valkey.environ(BIND_PORT=str(port)))
    reloader.says("listening")
    url = f"http://127.0.0.1:{port}/livez"
    runs, answered = 1, 0

    async def asked_while_it_starts_again() -> bool:
        nonlocal answered
        async with aiohttp.request("GET", url, headers={"Connection": "close"}) as answer:
            answered += answer.status == 200
        return reloader.output.read_text().count("listening") > runs

    for runs in range(1, 4):
        (reloader.folder / "thing" / f"new{runs}.py").touch()
        await eventually(asked_while_it_starts_again, 10 * SLACK)
    assert answered
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(5 * SLACK) == 0
    with pytest.raises(aiohttp.ClientConnectorError):  # nothing listens on the port any more
        async with aiohttp.request("GET", url):
            pass


def test_ctrl_c_on_a_terminal_cuts_off_no_request(reloader: Reloader) -> None:
    reloader.file.write_text(ASKED_ONCE)
    terminal, stdin = pty.openpty()
    with open(terminal, "wb", buffering=0) as keys, open(stdin, "rb"):
        popen = reloader.start(terminal=stdin)
        reloader.says("runs")
        keys.write(b"\x03")
        assert popen.wait(5 * SLACK) == 0


def test_second_signal_is_passed_on_to_the_service(reloader: Reloader) -> None:
    reloader.file.write_text(ASKED_ONCE.replace("sleep(0.5)", "sleep(60)"))
    popen = reloader.start()
    reloader.says("runs")
    popen.send_signal(signal.SIGTERM)
    reloader.says("ends")
    popen.send_signal(signal.SIGTERM)
    assert popen.wait(5 * SLACK) == 3
