"""The manifests of a release run the published image by its digest."""

import os
import shutil
from pathlib import Path

import pytest

from nanoservice.testing.waiting import wait_for
from tests.support.cluster import KUBECTL, SERVICE, namespace, run
from tests.support.published import REGISTRY, published

pytestmark = pytest.mark.cluster


@pytest.mark.skipif(not REGISTRY, reason="a release is pulled from a registry: make e2e REGISTRY=...")
def test_manifests_of_a_release_run_the_image_that_was_published(tmp_path: Path) -> None:
    release = published("build", "publish")
    image = f"{release.repositories[0]}@{release.digest}"
    shutil.copy(release.dist / "release" / "production.yaml", tmp_path)
    with namespace("release") as one:
        lines = [f"namespace: {one.name}", "resources: [production.yaml]"]
        if valkey := os.environ.get("VALKEY"):  # some clusters can pull only from their own registry
            name, tag = valkey.rsplit(":", 1)
            lines.append(f'images: [{{name: docker.io/valkey/valkey, newName: {name}, newTag: "{tag}", digest: ""}}]')
        (tmp_path / "kustomization.yaml").write_text("\n".join(lines))
        one.make("secret")
        one.apply(run(KUBECTL, "kustomize", str(tmp_path)))
        for what in "statefulset/redis", "deployment/hitcounter":
            one.await_rollout(what)
        wait_for(one.ready, 60)
        assert wait_for(one.answered, 30)[0] == 1
        for pod in one.pods(SERVICE):
            assert pod["spec"]["containers"][0]["image"] == image
