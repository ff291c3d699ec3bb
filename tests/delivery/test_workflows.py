"""The workflows follow the rules that no linter checks.

`make lint` checks all other rules, with zizmor, actionlint and the schema of workflows.
"""

import re
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.workflows import CI, NOT_HERE, RELEASE, Run, runs

WORKFLOWS = {"ci": CI, "release": RELEASE}
JOBS = [pytest.param(job, id=f"{name}-{key}") for name, workflow in WORKFLOWS.items() for key, job in workflow["jobs"].items()]
RUNS = [run for workflow in WORKFLOWS.values() for run in runs(workflow)]
# HERE is the text of .ci/run and .ci/steps. Titles of steps and comments are removed, because they run nothing.
HERE = re.sub(r'step "[^"]*"|(?<!\S)#.*', "step", "".join((ROOT / ".ci" / name).read_text() for name in ("run", "steps")))
# These are the commands of a release that this machine can run. test_publish.py executes them unchanged.
EXECUTED = {run.line for run in runs(RELEASE) if run.here}
# hitcounter: begin
# tests/e2e/test_skaffold.py executes these commands.
EXECUTED |= {run.line for run in runs(CI) if run.line.startswith(("skaffold ", "kubectl wait "))}
# hitcounter: end


def uses() -> list[tuple[str, str, str]]:
    """Return the name, the commit and the version of each action that the workflows use."""
    text = "".join(path.read_text() for path in sorted((ROOT / ".github" / "workflows").iterdir()))
    return list(re.findall(r"uses: (?!\./)([\w./-]+)@(\S+)(?:  # (\S+))?", text))


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_command_of_a_workflow_is_one_that_is_tested(run: Run) -> None:
    assert "\n" not in run.line
    assert "${{" not in run.line
    if run.targets:
        assert set(run.targets) <= set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if run.here and run.line not in EXECUTED:
        assert re.search(rf"(?<![\w-]){re.escape(run.line)}(?![\w-])", HERE), f"neither .ci/run nor a test runs it: {run.line}"


def test_each_exception_in_not_here_is_still_needed() -> None:
    for beginning in NOT_HERE:
        assert [run for run in RUNS if run.line.startswith(beginning)], beginning


def test_actions_are_named_by_commit_and_version() -> None:
    for name, commit, version in uses():
        assert re.fullmatch(r"[0-9a-f]{40}", commit), name
        assert re.fullmatch(r"v\d+\.\d+\.\d+", version), name
    assert len(uses()) > 10
    assert len({name for name, _, _ in uses()}) == len(set(uses()))  # no action is used in two versions


@pytest.mark.parametrize("job", JOBS)
def test_job_has_its_limits(job: Any) -> None:
    assert job["name"]
    assert job["permissions"]
    if "uses" not in job:
        assert job["timeout-minutes"] <= 60
        runners = job["strategy"]["matrix"]["runner"] if "matrix.runner" in job["runs-on"] else [job["runs-on"]]
        assert set(runners) <= {"ubuntu-24.04", "ubuntu-24.04-arm", "macos-15"}


def test_python_that_is_set_up_is_the_one_that_make_uses() -> None:
    """make would prefer a newer Python that is on the runner. So a job that sets up another Python also sets PYTHON."""
    set_up = {
        job: step["with"]["python-version"]
        for job, one in CI["jobs"].items()
        for step in one["steps"]
        if step.get("uses", "").startswith("actions/setup-python@")
    }
    assert {"lint", "test"} <= set_up.keys()
    for run in runs(CI):
        if run.targets and set_up.get(run.job, "3.13") != "3.13":
            assert dict(run.environ).get("PYTHON") == f"python{set_up[run.job]}", run


def test_code_of_a_pull_request_gets_no_secret_and_may_write_nothing() -> None:
    assert "pull_request_target" not in CI[True]  # YAML reads the key `on` as True
    assert not re.search(r"secrets\.|github\.token", str(CI))
    assert [job["permissions"] for job in CI["jobs"].values()] == [{"contents": "read"}] * len(CI["jobs"])


def needed(job: str) -> set[str]:
    """Return the jobs of a release that must succeed before `job` begins."""
    needs = RELEASE["jobs"][job].get("needs", [])
    direct = {needs} if isinstance(needs, str) else set(needs)
    return direct.union(*map(needed, direct))


def test_image_is_signed_and_published_only_after_two_equal_builds_and_a_scan() -> None:
    writing = {name for name, job in RELEASE["jobs"].items() if "write" in job["permissions"].values()}
    assert writing == {"publish", "attest", "github-release"}
    for name in writing:
        assert needed(name) >= {"ci", "build", "rebuild", "scan"}
    lines = [run.line for run in runs(RELEASE) if run.job == "publish"]
    assert lines.index("make release-compare") < lines.index("make publish") < lines.index("make sign")
    assert not [job for job in RELEASE["jobs"].values() if job.get("continue-on-error")]


def test_each_build_of_a_release_is_compared_with_the_first() -> None:
    compared = {run.job: dict(run.environ)["DIGESTS"] for run in runs(RELEASE) if run.line.startswith("make release-compare")}
    jobs = ("rebuild", "dry-run", "publish", "attest", "github-release")
    assert compared == dict.fromkeys(jobs, "${{ needs.build.outputs.digests }}")


def test_files_of_a_release_are_those_that_were_attested() -> None:
    lines = [run.line for run in runs(RELEASE) if run.job == "publish"]
    assert lines.index("make release-files") < lines.index('make release-sums >>"$GITHUB_OUTPUT"')
    *_, compared, uploaded = (run for run in runs(RELEASE) if run.job == "github-release")
    assert compared.line == "make release-files-compare"
    assert dict(compared.environ)["SUMS"] == "${{ needs.publish.outputs.sums }}"
    assert uploaded.line.startswith("gh release create")


def test_dry_run_publishes_nothing() -> None:
    jobs = RELEASE["jobs"]
    assert jobs["publish"]["if"] == "github.event_name == 'push'"
    assert "publish" in needed("github-release")
    assert needed("attest") >= {"publish"}
    assert "secrets." not in str({name: job for name, job in jobs.items() if name not in ("publish", "attest")})


def test_each_service_is_scanned_and_attested() -> None:
    services = "${{ fromJSON(needs.services.outputs.services) }}"
    assert {name for name, job in RELEASE["jobs"].items() if "service" in job.get("strategy", {}).get("matrix", {})} == {
        "scan", "attest",
    }  # fmt: skip
    for name in ("scan", "attest"):
        assert RELEASE["jobs"][name]["strategy"]["matrix"]["service"] == services
        assert "services" in needed(name)
    (printed,) = (run for run in runs(RELEASE) if run.job == "services")
    assert printed.line == 'make services FORMAT=json >>"$GITHUB_OUTPUT"'


def test_scanner_gets_no_secret() -> None:
    (step,) = (step for step in RELEASE["jobs"]["scan"]["steps"] if "trivy" in step.get("uses", ""))
    assert step["with"] | {"severity": "CRITICAL", "ignore-unfixed": True, "exit-code": "1"} == step["with"]
    assert RELEASE["jobs"]["scan"]["permissions"] == {"contents": "read"}
