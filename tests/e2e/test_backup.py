"""Redis keeps its data when its pod is deleted, and a backup restores the data."""

import re
import shlex
from pathlib import Path

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support import ROOT
from tests.support.cluster import Deployed, Namespace, install

pytestmark = pytest.mark.cluster


def test_volume_survives_the_pod(cluster: Deployed) -> None:
    namespace = cluster.namespace
    before = namespace.counts()
    namespace.kubectl("delete", "pod", "redis-0")
    namespace.kubectl("wait", "--for=create", "pod/redis-0", "--timeout=60s")
    namespace.await_rollout("statefulset/redis")
    assert wait_for(namespace.answered, 30) == (before[0] + 1, before[1])


def test_service_logs_that_a_restore_has_lost_counts(cluster: Deployed, tmp_path: Path) -> None:
    namespace, file = cluster.namespace, tmp_path / "hitcounter.rdb"
    before = namespace.counts()
    namespace.make("backup", f"FILE={file}")
    for _ in range(3):
        namespace.counts()
    namespace.make("restore", f"FILE={file}")
    assert wait_for(namespace.answered, 30) == (before[0] + 1, before[1])
    assert "Redis has lost counts that were answered" in namespace.kubectl("logs", "deployment/hitcounter")
    # Undo the restore with the command from docs/operations.md.
    (line,) = re.findall(r"^kubectl (exec .*before-restore.*)", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    namespace.kubectl(*shlex.split(line))
    namespace.kubectl("delete", "pod", "redis-0")
    namespace.await_rollout("statefulset/redis")
    assert wait_for(namespace.answered, 30) == (before[0] + 4, before[1])


def test_backup_gives_the_counts_of_its_moment_in_another_namespace(cluster: Deployed, other: Namespace, tmp_path: Path) -> None:
    file = tmp_path / "hitcounter.rdb"
    at_backup = cluster.namespace.counts()
    cluster.namespace.make("backup", f"FILE={file}")
    for _ in range(3):
        last = cluster.namespace.counts()
    install(cluster, other)
    assert wait_for(other.answered, 30) == (1, 0)
    other.make("restore", f"FILE={file}")
    restored = wait_for(other.answered, 30)
    print(f"\nbacked up at {at_backup}, restored {restored[0] - 1} hits; lost: the {last[0] - at_backup[0]} that came after")
    assert restored == (at_backup[0] + 1, at_backup[1])
    # The service answered a count of 1 before the restore. The restored count is higher, so the service must not report a loss.
    log = other.kubectl("logs", "deployment/hitcounter")
    assert "Redis has lost counts" not in log


def test_restore_refuses_an_incomplete_snapshot_and_changes_nothing(cluster: Deployed, tmp_path: Path) -> None:
    file = tmp_path / "hitcounter.rdb"
    cluster.namespace.make("backup", f"FILE={file}")
    torn = tmp_path / "torn.rdb"
    torn.write_bytes(file.read_bytes()[:-20])
    before = cluster.namespace.counts()
    with pytest.raises(AssertionError, match="not a snapshot of Redis; nothing has changed"):
        cluster.namespace.make("restore", f"FILE={torn}")
    assert cluster.namespace.counts() == (before[0] + 1, before[1])
    assert not re.search("restored", cluster.namespace.kubectl("exec", "redis-0", "--", "ls", "/data"))
