"""Each make target, file, class, message and metric that the Markdown texts name exists, and each link has a target."""

import re
from pathlib import Path

import pytest
import yaml

from nanoservice.testing.served import Served
from tests.support import ROOT
from tests.support.services import names

TEXTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), ROOT / "chart" / "README.md"]
of_each_text = pytest.mark.parametrize("text", TEXTS, ids=lambda path: path.name)


# A changelog also names targets that were removed later.
@pytest.mark.parametrize("text", [text for text in TEXTS if text.name != "CHANGELOG.md"], ids=lambda path: path.name)
def test_make_targets_exist(text: Path) -> None:
    commands = re.findall(r"^ *make ([a-z][a-z0-9 -]*)|`make ([a-z][a-z0-9 -]*)", text.read_text(), re.MULTILINE)
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {target for both in commands for target in "".join(both).split()} <= targets


@of_each_text
def test_files_exist(text: Path) -> None:
    content = text.read_text()
    # A path in backquotes starts at the repository's root. A link starts at the folder of the text that contains the link. A text
    # may name a test file without its folder.
    named = re.findall(
        rf"`((?:\.ci|bench|docs|{'|'.join(names())}|image|manifests|monitoring|nanoservice|tests)/[\w./-]+)`", content
    )
    linked = re.findall(r"\]\((?!https?://)([\w./-]+)\)", content)
    # In the texts, `likes` is an example of a new service.
    missing = [name for name in named if not (ROOT / name).exists() and "/likes/" not in name]
    missing += [name for name in linked if not (text.parent / name).exists()]
    tests = {path.name for folder in ("tests", "scripts/template") for path in (ROOT / folder).rglob("test_*.py")}
    missing += set(re.findall(r"\btest_\w+\.py\b", content)) - tests
    assert not missing


@of_each_text
def test_checksum_commands_run_in_busybox(text: Path) -> None:
    """The sha256sum of busybox, which Alpine has, has no long options."""
    assert not re.findall(r"\b(?:sha256sum|shasum) [^#\n]*--\w+", text.read_text())


def anchors(text: Path) -> set[str]:
    """Return the anchors of a Markdown file's headings, as GitHub makes them."""
    content = re.sub(r"^ *```.*?^ *```", "", text.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", content, re.MULTILINE):
        name = re.sub(r"[^\w -]", "", re.sub(r"\]\([^)]*\)", "", heading).lower()).replace(" ", "-")
        assert name not in names, f"{text.name} has the heading {heading!r} twice: its anchor would move with the order"
        names.add(name)
    return names


@of_each_text
def test_targets_of_links_exist(text: Path) -> None:
    missing = []
    for target in re.findall(r"\]\((?!https?://|mailto:)([^)\s]+)\)", text.read_text()):
        name, _, anchor = target.partition("#")
        file = text.parent / name if name else text
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)
    assert not missing


@of_each_text
def test_classes_are_in_the_file_that_the_text_links(text: Path) -> None:
    """A text names a class after or before a link to its file: "[a.py](../a.py), `Lane`" or "`Lane` in [a.py](../a.py)"."""
    content = text.read_text()
    named = re.findall(r"\]\(([\w./]+\.py)\), `([A-Z]\w+)`", content)
    named += [(file, name) for name, file in re.findall(r"`([A-Z]\w+)` in \[[^]]*\]\(([\w./]+\.py)\)", content)]
    assert not [(file, name) for file, name in named if f"\nclass {name}" not in (text.parent / file).read_text()]


def test_symptoms_of_the_runbook_are_its_headings_in_the_order_of_the_index() -> None:
    content = (ROOT / "docs" / "operations.md").read_text()
    index = re.findall(r"^\| \[(.+?)\]\(#", content, re.MULTILINE)
    part = content.partition("## Which symptom do you see?")[2].partition("\n## ")[0]
    assert index
    assert re.findall(r"^### (.+)$", part, re.MULTILINE) == index


def test_details_of_the_runbook_are_those_of_the_code() -> None:
    """The runbook's table of causes quotes the `detail` that a client gets."""
    table = (ROOT / "docs" / "operations.md").read_text().partition("\n| `detail` |")[2].partition("\n\n")[0]
    details = re.findall(r"^\| `(.+?)` \|", table, re.MULTILINE)
    code = "".join(path.read_text() for folder in ("nanoservice", *names()) for path in (ROOT / folder).glob("*.py"))
    assert details
    for detail in details:
        words = re.sub(r"^Redis:? |: \.\.\.$|: it may have been counted$", "", detail)
        assert words in code, detail


# Messages that begin with these words come from kubectl, Kubernetes or Valkey, so this repository's code does not contain them.
_FOREIGN = (
    "deployment", "statefulset.apps", "persistentvolumeclaim/", 'secret "', "Failed to pull", "must support resize",
    "Bad ", "Can't recover", "Digest:", "Ready to accept", "Unrecoverable ", "Valkey version=",
)  # fmt: skip


def test_messages_of_the_runbook_are_those_of_the_code() -> None:
    """A message is a text in backquotes, in a paragraph that describes what you see, or what a log or a command prints."""
    text = re.sub(r"^ *(```.*?^ *```|\|.*?$)", "", (ROOT / "docs" / "operations.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    paragraphs = [it for it in re.split(r"\n\s*\n", text) if re.search(r"\b([Yy]ou see|logs?|says|prints?)\b", it)]
    messages = {message for it in paragraphs for message in re.findall(r"`([^`\n]+)`", it) if " " in message}
    messages = {message for message in messages if not message.startswith((*_FOREIGN, "kubectl ", "make "))}
    assert "Redis works again" in messages
    sources = [*ROOT.glob("scripts/**/*.sh"), ROOT / "manifests" / "redis" / "redis.sh"]
    sources += [path for folder in ("nanoservice", *names()) for path in (ROOT / folder).glob("*.py")]
    code = "".join(path.read_text() for path in sources).replace("$name", names()[0])
    for message in messages:
        for part in re.split(r": |\.\.\.|\b[A-Z_]{3,}\b", message):  # compare only the parts between names and values
            assert part.strip() in code, message


def test_every_alert_leads_to_a_heading_of_the_runbook_and_is_on_the_page_about_monitoring() -> None:
    groups = yaml.safe_load((ROOT / "manifests" / "components" / "monitoring" / "rules.yaml").read_text())["spec"]["groups"]
    alerts = {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}
    links = {}
    for name, rule in alerts.items():
        links[name] = re.sub(r"^https://github\.com/[\w-]+/[\w-]+/blob/main/docs/", "", rule["annotations"]["runbook_url"])
        file, _, anchor = links[name].partition("#")
        assert anchor in anchors(ROOT / "docs" / file), name
    table = re.findall(r"^\| \[`(\w+)`\]\((.+?)\) \| (\w+) \|", (ROOT / "docs" / "monitoring.md").read_text(), re.MULTILINE)
    assert table == [(name, links[name], rule["labels"]["severity"]) for name, rule in alerts.items()]


AIR_GAP = ROOT / "docs" / "air-gap.md"
INSTALL = ROOT / "scripts" / "bundle" / "install.sh"


def test_commands_on_the_page_about_air_gaps_are_those_of_install_sh() -> None:
    head = INSTALL.read_text().partition("\nset -eu\n")[0]
    variables = set(re.findall(r"\b[A-Z]+(?:_[A-Z]+)*\b", head.partition("reads these variables:\n")[2]))
    text = AIR_GAP.read_text()
    commands = re.findall(r"((?:[A-Z_]+=(?:\"[^\"]*\"|\S+) +)*)sh install\.sh ([a-z]+)", text)
    assert {command for _, command in commands} == set(re.findall(r"^# .*sh install\.sh (\w+)", head, re.MULTILINE))
    assert {name for before, _ in commands for name in re.findall(r"([A-Z_]+)=", before)} <= variables
    variants = set(re.findall(r"VARIANT=(\S+) ", text)) | set(re.findall(r"`(production-[\w-]+)`", text))
    assert variants - {"chart"} <= {file.stem for file in (ROOT / "manifests" / "rendered").glob("*.yaml")}
    scripts = re.findall(r"\bsh (scripts/[\w./-]+\.sh)", text)
    assert scripts
    assert not [name for name in scripts if not (ROOT / name).exists()]


def test_page_about_air_gaps_removes_the_password_that_may_push_before_deploy() -> None:
    """`deploy` writes REGISTRY_USERNAME and REGISTRY_PASSWORD into the cluster."""
    before_deploy = AIR_GAP.read_text().partition("\n## Without internet: how do I deploy?")[0]
    exported = set(re.findall(r"export (REGISTRY_\w+)", before_deploy))
    assert exported == {"REGISTRY_USERNAME", "REGISTRY_PASSWORD"}
    (removed,) = re.findall(r"unset (.+)", before_deploy.rpartition("export ")[2])
    assert set(removed.split()) == exported


def test_messages_on_the_page_about_air_gaps_are_those_of_install_sh() -> None:
    """A message is a text in backquotes: after "You see", or in the first column of the last table."""
    text = AIR_GAP.read_text()
    rows = re.findall(r"^\| (`.+?) \|", text.partition("\n| message |")[2].partition("\n\n")[0], re.MULTILINE)
    seen = [line for line in text.splitlines() if re.search(r"\b[Yy]ou see .*`", line)]
    messages = {message for line in [*rows, *seen] for message in re.findall(r"`([^`\n]+)`", line) if " " in message}
    # These are messages of ssh-keygen and kubectl.
    messages = {it for it in messages if not it.startswith(("Good ", "Write ", "no matches ", "partitioned "))}
    sources = [INSTALL, INSTALL.parent / "push.py", *(ROOT / "scripts").glob("lib/*.sh"), ROOT / "scripts" / "secret-rotate.sh"]
    code = "".join(path.read_text() for path in sources)
    assert len(rows) > 10
    for message in messages:
        for part in re.split(r"\S*\.\.\.|\S*\d\S*|\(production\)", message):  # compare only the parts between names and versions
            assert part.strip() in code, message


async def test_metrics_of_the_runbook_are_measured(served: Served) -> None:
    content = (ROOT / "docs" / "operations.md").read_text()
    named = re.findall(r"^\| `([a-z]+_[a-z_]+)` \|", content, re.MULTILINE)
    named += re.findall(r"\b((?:http|counter|process|redis)_[a-z_]+)[{[]", content)  # in a query, { or [ follows the metric
    page_about_monitoring = (ROOT / "docs" / "monitoring.md").read_text()
    named += re.findall(r"`((?:http|counter|process|redis|event_loop)_[a-z_]+)`", page_about_monitoring)
    async with served.client.get("/") as answer:
        assert answer.status == 200
    async with served.client.get(f"http://127.0.0.1:{served.admin_port}/metrics") as answer:
        page = await answer.text()
    assert named
    assert not [name for name in named if not re.search(rf"^{name}(_count)?\b[^_]", page, re.MULTILINE)]
