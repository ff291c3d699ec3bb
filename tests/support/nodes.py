"""Drain nodes of the cluster, and lose nodes.

The variable NODES names a command that loses a node and brings it back: `NODES cut NAME` takes the node's network away,
`NODES heal NAME` gives it back, `NODES kill NAME` is a power failure, and `NODES start NAME` starts the node again.
The tests never lose the first node, because they send their requests to its address.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import KUBECTL, Deployed, Namespace, run

BACK = {"kill": "start", "cut": "heal"}


def node_names(namespace: Namespace) -> list[str]:
    return [node["metadata"]["name"] for node in namespace.get("nodes")]


def first_node(one: Deployed) -> str:
    """Return the name of the node that has the address of the service's URL."""
    address = one.url.removeprefix("http://").split(":")[0]
    for node in one.namespace.get("nodes"):
        if {"type": "InternalIP", "address": address} in node["status"]["addresses"]:
            return str(node["metadata"]["name"])
    raise AssertionError(f"no node has the address {address}")


def node_of(namespace: Namespace, pod: str) -> str:
    return str(namespace.get("pod", pod)["spec"]["nodeName"])


def nodes_of(pods: list[Any]) -> list[str]:
    """Return the node of each pod that has one."""
    return [pod["spec"]["nodeName"] for pod in pods if "nodeName" in pod["spec"]]


def replaced(namespace: Namespace, pod: str, uid: str) -> bool:
    """Return whether the pod exists, and is another one than that of `uid`."""
    found = namespace.kubectl("get", "pod", pod, "--ignore-not-found", "--output=jsonpath={.metadata.uid}")
    return found not in ("", uid)


def node_is_ready(namespace: Namespace, node: str) -> bool:
    conditions = namespace.get("node", node)["status"]["conditions"]
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def change_node(action: str, node: str) -> None:
    assert os.environ.get("NODES"), "set NODES to a command that loses a node: see the head of tests/support/nodes.py"
    run(*os.environ["NODES"].split(), action, node)


def bring_back(namespace: Namespace, how: str, node: str) -> None:
    """Bring back a node that was lost by `how`, and wait until it is ready."""
    with suppress(AssertionError):  # the command may give up before the node is ready
        change_node(BACK[how], node)
    wait_for(lambda: node_is_ready(namespace, node), 120, f"{node} is ready")


@contextmanager
def cordoned(*nodes: str) -> Iterator[None]:
    """Let no new pod start on the nodes while the block runs."""
    run(KUBECTL, "cordon", *nodes)
    try:
        yield
    finally:
        run(KUBECTL, "uncordon", *nodes)


def drain(node: str) -> float:
    """Drain a node, as an operator does. Return the seconds that this took.

    Only pods of this repository are evicted. A small cluster may have only one pod for its DNS, and without DNS no pod of the
    service can connect to Redis again.
    """
    began = time.monotonic()
    options = ["--ignore-daemonsets", "--delete-emptydir-data", "--pod-selector=app.kubernetes.io/part-of=hitcounter"]
    run(KUBECTL, "drain", node, *options, "--timeout=180s", seconds=200)
    return time.monotonic() - began


def uncordon(node: str) -> None:
    run(KUBECTL, "uncordon", node)


@contextmanager
def out_of_service(namespace: Namespace, node: str) -> Iterator[None]:
    """Wait until Kubernetes has noticed that the node is lost, and mark the node as out of service while the block runs."""
    wait_for(lambda: not node_is_ready(namespace, node), 180, f"{node} is not ready")
    taint = "node.kubernetes.io/out-of-service"
    run(KUBECTL, "taint", "nodes", node, f"{taint}=nodeshutdown:NoExecute")
    try:
        yield
    finally:
        run(KUBECTL, "taint", "nodes", node, f"{taint}-")
