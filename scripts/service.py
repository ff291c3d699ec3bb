"""Make or remove a service, rename the project, or check that every list of the repository has every service.

Usage: service.py add NAME | remove NAME | rename-project NAME | check

`add` copies the files of scripts/template/, in which the service is called `starter`. It also adds an entry to each list that no
tool can compute. scripts/template/entries/ has these entries, with the ports of the first service; a new service gets the next
free ports. If the service exists already, `add` adds only the entries that are missing. `remove` deletes the service's files and
entries, and what belongs to the service: files, lines between the comments `NAME: begin` and `NAME: end`, and lines of texts that
describe it. Where another text uses the service as an example, `remove` names another service instead.
`rename-project` gives another name to the namespace, the labels, the Compose project and the images' folder in the registry.

The script works on a copy of the repository. It changes the repository itself only after everything has succeeded in the copy.
The script needs git, which knows the files of the repository, ruff beside the running Python, and kubectl (KUBECTL).
"""

import fcntl
import json
import keyword
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = Path("scripts/template")
FOLDERS = {"starter": "{}", "starter_tests": "tests/{}", "manifests": "manifests/{}"}  # a folder of the template, and its place
USERS = "manifests/redis/users.acl"

# Each file here has the entries that a service has in the list of the same path. The first line of an entry names the service,
# and the entry continues over all lines that are indented further. The lines above an entry say to which part of the list it
# belongs.
ENTRIES = TEMPLATE / "entries"
# In these files each service has a document of its own.
DOCUMENTS = ["manifests/production/autoscaler.yaml", "manifests/production/ingress.yaml"]
LISTS = sorted({it.relative_to(ROOT / ENTRIES).as_posix() for it in (ROOT / ENTRIES).rglob("*") if it.is_file()} - {*DOCUMENTS})
# The places where an entry has a port that follows from the service's number.
PORTS = {"nodePort, value: {}": 30080, "localPort: {}": 8080, ":-{}}": 8080}
# hitcounter: begin
# The folders and files that belong to the service, besides its own folders.
BELONGINGS = [
    "bench",
    "docs/dashboard.svg",
    "docs/how-a-request-is-counted.md",
    "monitoring/picture.py",
    # These tests need the counts of hitcounter, and most need a container engine or a cluster.
    "tests/delivery/test_compose.py",
    "tests/delivery/test_image_attacked.py",
    "tests/delivery/test_image_runs.py",
    "tests/e2e",
    "tests/monitoring/test_alerts.py",
    # Only those tests and hitcounter's own use these modules.
    "tests/support/cluster.py",
    "tests/support/command_lines.py",
    "tests/support/failing_task.py",
    "tests/support/exhaustion.py",
    "tests/support/load.py",
    "tests/support/nodes.py",
    "tests/support/proxies.py",
    "tests/support/topologies.py",
    "tests/support/traffic.py",
]
# hitcounter: end
# YAML reads these words as a truth value or as nothing.
YAML_WORDS = {"false", "n", "no", "null", "off", "on", "true", "y", "yes"}
# Variables that begin with these words and a `_` are settings of every service, or other programs set them.
PREFIXES = re.compile(
    "admin|bind|drain|log|max|"
    "aws|ci|conda|dbus|debian|docker|git|github|gitlab|gnome|google|gpg|gtk|helm|java|kube|kubernetes|lc|ld|less|ls|make|node|"
    "npm|nvm|otel|pip|podman|pyenv|python|qt|runner|session|shell|skaffold|ssh|ssl|sudo|systemd|term|virtual|vscode|xdg"
)
UNTOUCHED = re.compile(
    r"CHANGELOG\.md|LICENSE|manifests/rendered/.*|chart/manifests/.*|requirements.*\.txt|.*\.(svg|sum|lock)|.*-lock\.json"
)
# Behind one of these texts, the word is the project's name. Elsewhere, the same word is the name of a service.
BEFORE_PROJECT = [
    r"\bnamespace(?:=\"?|: ?\"?|/| )",
    r"NAMESPACE(?:=| \?= ?|:-)",
    r"namespace in the cluster; the default is ",
    r"part-of(?:\"?: ?\"?|=)",
    r"--field-manager=",
    r"^module ",
    r"\"there ",
    r"(?<!ghcr\.io/)OWNER/",
    r"^# (?=\S+\n)",
    r"&& cd ",
    r"\bhelm (?:install|upgrade|rollback|test) ",
    r"/charts/",
    r"buildx (?:rm|create)(?: --\S+)* ",
    r"RUN = f\"",
    r"(?=\S+-airgap)",
    r"^ *\"?name\"?: \"?(?=\S+\n(?:build:|  labels:\n    app.kubernetes.io/part-of|\n# |description:|  \"build\"))",
]
PROJECT = f"(?m:(?P<before>{'|'.join(BEFORE_PROJECT)}))"
Trail = tuple[str, ...]  # the lines that a line is below, and the line itself, all without comments


class RefusalError(Exception):
    """The reason why nothing was done."""


def main(arguments: list[str]) -> int:
    """Run a command, and return the exit status."""
    os.chdir(ROOT)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        match arguments:
            case ["add", name]:
                add(name)
            case ["remove", name]:
                remove(name)
            case ["rename-project", name]:
                rename_project(name)
            case ["check"]:
                if wrong := missing(Path()):
                    raise RefusalError("\n".join([*wrong, "make service NAME=... adds an entry that is missing"]))
            case _:
                print(__doc__, file=sys.stderr)
                return os.EX_USAGE
    except RefusalError as refusal:
        print(f"make: {refusal}", file=sys.stderr)
        return 1
    return 0


def add(name: str) -> None:
    """Make the service `name`, or complete it."""
    if name not in numbers(Path()):
        check_name(name)
    changed = transact(lambda root: write(root, name))
    if not changed:
        print(f"{name} exists already and is complete; nothing has changed")
        return
    print("\n".join(changed))
    number = numbers(Path())[name]
    print(
        f"\nThe service {name} has been made. Its code is in {name}/app.py. To run it: make run SERVICE={name}\n"
        f"Then, in another terminal: curl --request POST http://localhost:{8080 + number}/"
    )


def check_name(name: str) -> None:
    """Raise RefusalError unless `name` can be the name of a new service."""
    if not re.fullmatch(r"[a-z][a-z0-9]{1,29}", name):
        raise RefusalError(
            f"NAME={name}: a service's name is a DNS label and a Python package at once,"
            " so it has 2 to 30 lower-case letters and digits, and begins with a letter"
        )
    if keyword.iskeyword(name) or keyword.issoftkeyword(name):
        raise RefusalError(f"NAME={name}: this is a keyword of Python")
    if name in YAML_WORDS:
        raise RefusalError(f"NAME={name}: YAML reads this word as a value, not as a name")
    if name in ("starter", "service"):
        raise RefusalError(f"NAME={name}: the template in scripts/, or the script that copies it, has this name")
    if name in sys.stdlib_module_names:
        raise RefusalError(f"NAME={name}: Python's standard library has a module of this name, which the service would replace")
    for place in FOLDERS.values():
        if Path(place.format(name)).exists():
            raise RefusalError(f"NAME={name}: {place.format(name)}/ exists already, and is not a service")
    sys.path = [folder for folder in sys.path if Path(folder).resolve() not in (ROOT, ROOT / "scripts")]
    if find_spec(name):
        raise RefusalError(f"NAME={name}: an installed package has this name, and the service would replace it")
    for file in sorted(Path("manifests").rglob("*.acl")):
        if re.search(rf"^user {name} ", file.read_text(), re.MULTILINE):
            raise RefusalError(f"NAME={name}: {file} has a user of this name already, whose rights the service would get")
    for file in map(Path, LISTS):
        lines = file.read_text().splitlines()
        if trails(lines).keys() & heads(template(Path(), str(file), lines, name, 0)[1]):
            raise RefusalError(f"NAME={name}: {file} has an entry of this name already, which is not a service's")
    if PREFIXES.fullmatch(name):
        raise RefusalError(f"NAME={name}: variables that begin with {name.upper()}_ exist already, and are not its settings")
    if not subprocess.run(["git", "check-ignore", "--quiet", f"{name}/"], check=False).returncode:
        raise RefusalError(f"NAME={name}: .gitignore names this folder, so git would not keep the service")


def write(root: Path, name: str) -> None:
    """Write the files and the entries of the service `name` into the copy `root` of the repository."""
    if name not in numbers(root):
        for folder, place in FOLDERS.items():
            for source in (root / TEMPLATE / folder).rglob("*"):
                target = root / place.format(name) / source.relative_to(root / TEMPLATE / folder)
                if source.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_text(named(source.read_text(), name))
        folders = [root / FOLDERS[folder].format(name) for folder in ("starter", "starter_tests")]
        # The order of the imports depends on the name.
        ruff = str(Path(sys.executable).parent / "ruff")
        run(root, ruff, "check", "--quiet", "--fix", *map(str, folders))
        run(root, ruff, "format", "--quiet", *map(str, folders))
    old, known = nodes(root).get(name, 0), numbers(root)
    for file in LISTS:
        lines = renumbered((root / file).read_text().splitlines())
        move(root, file, lines, name, old, known[name])
        text, needed = template(root, file, lines, name, known[name])
        others = [heads(template(root, file, lines, other, known[other])[1]) for other in known if other != name]
        for kind, head in enumerate(heads(needed)):
            there = trails(lines)
            alike = [there[each[kind]] for each in others if each[kind] in there]
            if head in there or not alike:
                continue
            begin, end = extent(lines, max(alike))
            entry = text[slice(*extent(text, needed[head]))]
            lines[end:end] = ["", *entry] if begin and not lines[begin - 1] else entry
            lines = renumbered(lines)
        (root / file).write_text("\n".join(lines) + "\n")
    for file in DOCUMENTS:
        path = root / file
        if not document(path, name):
            path.write_text(path.read_text() + "---\n" + named((root / ENTRIES / file).read_text(), name))
    finish(root)


def remove(name: str) -> None:
    """Remove the service `name`."""
    known = numbers(Path())
    if name not in known:
        raise RefusalError(f"NAME={name}: the services are {' '.join(known)}")
    if len(known) == 1:
        raise RefusalError(f"NAME={name}: this is the only service; first make another: make service NAME=...")
    heir = next(other for other in known if other != name)
    # Only the example has more files than those that `add` makes.
    example = f"# {name}: begin\n" in Path(__file__).read_text()
    places = [*(place.format(name) for place in FOLDERS.values()), *(globals()["BELONGINGS"] if example else [])]
    command = ["git", "status", "--porcelain", "--untracked-files=normal", "--", *places]
    status = subprocess.run(command, check=False, text=True, capture_output=True).stdout
    if status and os.environ.get("FORCE") != "1":
        raise RefusalError(f"NAME={name}: commit these files first, or delete them for ever with FORCE=1:\n{status.rstrip()}")

    def change(root: Path) -> None:
        before = files(root)
        for place in places:
            if (root / place).is_dir():
                shutil.rmtree(root / place)
            else:
                (root / place).unlink(missing_ok=True)
        for file in LISTS:
            lines = renumbered((root / file).read_text().splitlines())
            for head in reversed(heads(template(root, file, lines, name, known[name])[1])):
                if head not in (there := trails(lines)):
                    continue
                begin, end = extent(lines, there[head])
                if begin and not lines[begin - 1] and (end == len(lines) or not lines[end]):
                    begin -= 1  # one of the two empty lines
                del lines[begin:end]
            lines = renumbered(lines)
            if not known[name]:  # one service always has the number 0, and so the first ports, which texts and workflows name
                move(root, file, lines, heir, known[heir], 0)
            (root / file).write_text("\n".join(lines) + "\n")
        for file in DOCUMENTS:
            comment, texts = documents(root / file)
            kept = [text for text in texts if not re.search(rf"^  name: {name}$", text, re.MULTILINE)]
            (root / file).write_text(comment + "---\n".join(kept))
        if example:
            forget(root, name, heir, before)
        finish(root)

    print("\n".join(transact(change)))
    command = ["git", "grep", "--no-color", "--no-recurse-submodules", "--untracked", "-lw", name]
    named = subprocess.run(command, check=False, text=True, capture_output=True).stdout.split()
    print(
        f"\n{name} is removed. If a cluster still runs it: kubectl delete"
        " deployment,service,configmap,networkpolicy,poddisruptionbudget,horizontalpodautoscaler,ingress"
        f" --selector=app.kubernetes.io/name={name}\n"
        f"The command keeps the data: the Secret {name}-redis, the key {name} of the Secret redis-users, the keys in Redis that"
        f" begin with {{{name}}}:, and the folder .data/{name}/ of this machine."
    )
    if named:
        print(f"These files still name {name}: {' '.join(named)}")


def rename_project(new: str) -> None:
    """Name the namespace, the labels, the Compose project and the images' folder in the registry `new`."""
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", new):
        raise RefusalError(f"NAME={new}: a project's name is a DNS label of at most 40 letters, digits and hyphens")
    if new in YAML_WORDS:
        raise RefusalError(f"NAME={new}: YAML reads this word as a value, not as a name")
    if new == "default" or new.startswith("kube-"):
        raise RefusalError(f"NAME={new}: this namespace belongs to Kubernetes")
    old = project(Path())
    if new == old:
        print(f"the project's name is {new} already; nothing has changed")
        return

    def change(root: Path) -> None:
        services = "|".join([*numbers(root), "starter"])
        for path in texts(root):
            text = re.sub(rf"{PROJECT}{old}(?![a-z0-9])", rf"\g<before>{new}", path.read_text())
            # The manifests and the scripts name the images' folder in the example registry.
            if path.relative_to(root).parts[0] in ("manifests", "scripts"):
                text = re.sub(rf"(?<=registry\.example\.com/)({old}/)?(?=({services})\b|\$\{{image)", f"{new}/", text)
            if text != path.read_text():
                path.write_text(text)
        finish(root)

    print("\n".join(transact(change)))
    print(
        f"\nThe project's name is {new}. A cluster that runs it has the old namespace until: make undeploy NAMESPACE={old}\n"
        "To keep its data, make a backup first, and restore it in the new namespace."
    )


def project(root: Path) -> str:
    """Return the project's name, which is the name of its namespace."""
    found = re.search("^  name: (.+)$", (root / "manifests/namespace/namespace.yaml").read_text(), re.MULTILINE)
    if not found:
        raise RefusalError("manifests/namespace/namespace.yaml has no name")
    return found[1]


def forget(root: Path, name: str, other: str, before: dict[str, bytes]) -> None:
    """Remove from all texts what they say about the service `name`, and name the service `other` in their examples instead.

    `before` has the content of each file before files were deleted.
    """
    # hitcounter: begin
    dashboard = root / "manifests" / "components" / "monitoring" / "dashboard.json"
    board = json.loads(dashboard.read_text())
    headings = [index for index, panel in enumerate(board["panels"]) if panel["type"] == "row"]
    del board["panels"][headings[-1] :]  # JSON has no comments that could mark the service's own row, which is the last one
    dashboard.write_text(json.dumps(board, sort_keys=True, indent=1) + "\n")
    # hitcounter: end
    deleted = before.keys() - files(root).keys()
    kept = {Path(file).name for file in files(root)}
    # If the other service has such a file too, lines that name the deleted file name the other's file afterwards.
    deleted = {file for file in deleted if not (root / re.sub(rf"\b{name}\b", other, file)).exists()}
    alone = {Path(file).name for file in deleted} - kept
    tests = rf"(?:tests/\w+/)?(?:{'|'.join(re.escape(file) for file in alone if file.startswith('test_')) or '(?!)'})"
    words = {re.escape(file) for file in deleted | alone}
    words |= {rf"{folder}[/.]" for file in deleted if (folder := Path(file).parts[0]) != name and not (root / folder).exists()}
    folders = {"nanoservice", "scripts", "manifests", *numbers(root)}
    sources = [path for path in texts(root) if path.suffix in (".py", ".sh") and path.relative_to(root).parts[0] in folders]
    code = "".join(path.read_text() for path in sources)
    source = "".join(content.decode() for file, content in before.items() if file.startswith(f"{name}/"))
    words |= {metric for metric in re.findall(r"\"([a-z]+_[a-z_]+)\"", source) if metric not in code}
    words |= {header for header in re.findall(r"\"([A-Z][a-z]+(?:-[A-Z][a-z]+)+)\"", source) if header not in code}
    own = re.findall(r"(?m)^    (\w+): \w+ = setting\(", source)
    words |= {f"`{field.upper()}`" for field in own if f"    {field}: " not in code}

    def is_gone(sentence: str) -> bool:
        """Return whether a sentence names a file, metric, header, setting, make target or message that is gone."""
        quoted = [it.strip() for text in re.findall("`([^`]+)`", sentence) if " " in text for it in re.split(r": |\.\.\.", text)]
        quoted = [re.sub("^Redis:? ", "", part) for part in quoted if len(part) > 3]
        return bool(gone.search(sentence)) or any(part in source and part not in code for part in quoted)

    targets = set(re.findall(r"(?m)^([a-z0-9-]+):", before["Makefile"].decode()))
    makefile = re.sub(rf"(?m)^.*\b{name}: begin\b(?:.*\n)+?.*\b{name}: end\b.*\n", "", (root / "Makefile").read_text())
    words |= {rf"make {target}\b(?!-)" for target in targets - set(re.findall(r"(?m)^([a-z0-9-]+):", makefile))}
    gone = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(words, key=len, reverse=True))})")
    for path in texts(root):
        text = re.sub(rf"(?m)^.*\b{name}: begin\b(?:.*\n)+?.*\b{name}: end\b.*\n", "", path.read_text())
        if path.suffix != ".py":
            text = re.sub(r"\n{3,}", "\n\n", text)
        if path.suffix == ".md" and path.parts[-2] != "template":
            # In the README's list of folders, the explanations stay in their column.
            text = re.sub(rf"(?m)^{name}/ +(?=\S)", lambda folder: f"{other}/".ljust(len(folder[0]) - 1) + " ", text)
            # Of a sentence that mentions a deleted test, delete only the mention.
            text = re.sub(rf"`{tests}`, (?=`)|(?<=`), `{tests}`", "", text)
            text = re.sub(rf"\s\(`{tests}`[^)]*\)", "", text)
            text = re.sub(rf"\| `{tests}` \|$", "| no test provokes this |", text, flags=re.MULTILINE)
            rows = [re.match(r"\| \[(.+?)\]\(#([\w-]+)\)", line) for line in text.splitlines() if is_gone(line)]
            text = "".join(sentence for sentence in sentences(text) if not is_gone(sentence))
            text = re.sub(r"(?m)^ *```\w*\n *```\n", "", text)  # a block of code that has no line any more
            text = re.sub(r"\n{3,}", "\n\n", text)
            for heading, anchor in (row.groups() for row in rows if row):  # a row of an index: its section goes, too
                text = re.sub(rf"(?ms)^### {re.escape(heading)}\n.*?(?=^##)", "", text)
                text = re.sub(rf"(?m)^.*\]\(#{anchor}\).*\n", "", text)
        # Hide the project's name: only elsewhere is the same word the name of the service.
        hidden = re.sub(rf"{PROJECT}{name}(?![a-z0-9])", "\\g<before>\0", text)
        text = re.sub(rf"(?<![a-z0-9]){name}(?![a-z0-9])", other, hidden).replace("\0", name)
        text = text.replace(f"{name.upper()}_", f"{other.upper()}_")
        if text != path.read_text():
            path.write_text(text)
    drop_dead_links(root)
    ruff = str(Path(sys.executable).parent / "ruff")
    run(root, ruff, "check", "--quiet", "--fix", "--exit-zero", ".")
    run(root, ruff, "format", "--quiet", ".")


def drop_dead_links(root: Path) -> None:
    """Delete the sentences of Markdown texts that link to a file that does not exist."""
    for path in (path for path in texts(root) if path.suffix == ".md"):
        before = sentences(path.read_text())
        alive = [
            sentence
            for sentence in before
            if all((path.parent / target).exists() for target in re.findall(r"\]\((?!https?://|mailto:)([\w./-]+)", sentence))
        ]
        if alive != before:
            path.write_text("".join(alive))


def sentences(text: str) -> list[str]:
    """Return the parts of a Markdown text in order: a sentence, which may continue over lines, or another line."""
    parts, fenced, continues = [""], False, False
    for line in text.splitlines(keepends=True):
        if continues and not re.match(r" *([-*] |\d+\. |[|#]|```|<!--|$)", line):
            parts[-1] += line
        else:
            parts.append(line)
        fenced ^= line.lstrip().startswith("```")
        continues = not fenced and not re.search(r"[.:!?|]$|^ *(#|```|<!--)|^ {4}|^$", line.rstrip("\n"))
    return parts


def texts(root: Path) -> list[Path]:
    """Return the text files that people write."""
    return [path for name in files(root) if not UNTOUCHED.fullmatch(name) and b"\0" not in (path := root / name).read_bytes()]


def missing(root: Path) -> list[str]:
    """Return a sentence for each line that a list lacks, and for each user in Redis whose service does not exist."""
    known, ports, found = numbers(root), nodes(root), []
    for name, number in known.items():
        if name in ports and ports[name] != number:
            twin = next(other for other in known if other != name and ports.get(other) == ports[name])
            found.append(f"{name} has the ports of {twin}; to give {name} ports of its own: make service NAME={name}")
    for file in LISTS:
        lines = (root / file).read_text().splitlines()
        there = trails(lines)
        for name, number in known.items():
            text, needed = template(root, file, lines, name, ports.get(name, number))
            lacking = {trail: index for trail, index in needed.items() if trail not in there}
            for trail in heads(lacking):
                where = "has no line for" if trail in heads(needed) else "lacks a line in the entry of"
                found.append(f"{file} {where} {name}: {text[lacking[trail]].strip()}")
    for file in DOCUMENTS:
        for name in known:
            lines = [bare(line) for line in document(root / file, name).splitlines()]
            text, needed = template(root, file, lines, name, 0)
            if not lines:
                found.append(f"{file} has no document for {name}")
            elif lacks := {bare(text[index]) for index in needed.values()} - {*lines}:
                found += [f"{file} lacks a line in the document of {name}: {line.strip()}" for line in sorted(lacks)]
    users = re.findall("^user ([a-z0-9]+) ", (root / USERS).read_text(), re.MULTILINE)
    unknown = set(users) - {*known, "default", "probe", "operator"}
    return [*found, *(f"{USERS} has the user {user}, but there is no {user}/__main__.py" for user in sorted(unknown))]


# --- the text of a list ---


def named(text: str, name: str) -> str:
    """Return a text of the template with the name of a service."""
    return re.sub(r"\bstarter\b", name, text).replace("STARTER_", f"{name.upper()}_")


def template(root: Path, file: str, lines: list[str], name: str, number: int) -> tuple[list[str], dict[Trail, int]]:
    """Return the lines of the template for the list `file`, with the name, ports and index of a service.

    Return also the trail and the index of each line that the list, whose content is `lines`, must have: those lines that name the
    service or have its port. A line with the domain example.com is left out, because people replace it.
    """
    raw = (root / ENTRIES / file).read_text()
    text = named(with_ports(raw, 0, number), name).replace("artifacts/0", f"artifacts/{[*artifacts(lines), name].index(name)}")
    marks = ["starter", *(form.replace("{}", str(first)) for form, first in PORTS.items())]
    needed = [any(mark in line for mark in marks) and "example.com" not in line for line in raw.splitlines()]
    return text.splitlines(), {trail: index for trail, index in trails(text.splitlines()).items() if needed[index]}


def trails(lines: list[str]) -> dict[Trail, int]:
    """Return a dict from the trail of each line to the line's index. Lines that are only a comment are left out."""
    found: dict[Trail, int] = {}
    trail: list[tuple[int, str]] = []
    for index, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        depth = -1 if line.startswith("[") else len(line) - len(line.lstrip())  # a heading of TOML is above what follows
        trail = [*((above, text) for above, text in trail if above < depth), (depth, bare(line))]
        found.setdefault(tuple(text for _, text in trail), index)
    return found


def bare(line: str) -> str:
    """Return a line without values that people may change, and without its comment unless this is the name of a service."""
    return re.sub(r"^(user \w+|\w+ =) .*", r"\1", re.sub(" +# .* .*", "", line))


def heads(needed: dict[Trail, int]) -> list[Trail]:
    """Return the trails that are not below another of the trails: those of the first lines of the entries."""
    return [trail for trail in needed if not any(trail[:length] in needed for length in range(len(trail)))]


def move(root: Path, file: str, lines: list[str], name: str, old: int, new: int) -> None:
    """Replace the ports of the number `old` by those of the number `new` in the entries of the service `name`."""
    there = trails(lines)
    for head in heads(template(root, file, lines, name, old)[1]):
        if head in there:
            begin, end = extent(lines, there[head])
            lines[begin:end] = [with_ports(line, old, new) for line in lines[begin:end]]


def extent(lines: list[str], begin: int) -> tuple[int, int]:
    """Return the indexes of the first line of an entry and of the line after its last line."""
    depth, end = len(lines[begin]) - len(lines[begin].lstrip()), begin + 1
    while end < len(lines) and len(lines[end]) - len(lines[end].lstrip()) > depth:
        end += 1
    return begin, end


def with_ports(text: str, old_number: int, number: int) -> str:
    """Return `text` with the ports of the service `number` instead of those of the service `old_number`."""
    for form, first in PORTS.items():
        text = text.replace(form.replace("{}", str(first + old_number)), form.replace("{}", str(first + number)))
    return text


def artifacts(lines: list[str]) -> list[str]:
    """Return the names in the list of artifacts, if `lines` are those of skaffold.yaml."""
    return [match[1] for line in lines if (match := re.fullmatch("    - image: ([a-z0-9]+)", line))]


def renumbered(lines: list[str]) -> list[str]:
    """Return the lines of skaffold.yaml with each service's index in the list of artifacts; other lines stay as they are."""
    order, name, result = artifacts(lines), "", []
    for line in lines:
        if match := re.fullmatch("      - .*# ([a-z0-9]+)", line):
            name = match[1]
        result.append(re.sub("(?<=/build/artifacts/)[0-9]+", str(order.index(name)), line) if name in order else line)
    return result


def documents(path: Path) -> tuple[str, list[str]]:
    """Return the comment at the head of a YAML file, and the text of each of its documents."""
    text = path.read_text()
    begin = text.index("apiVersion:")
    return text[:begin], text[begin:].split("---\n")


def document(path: Path, name: str) -> str:
    """Return the text of the document about `name`, or an empty string."""
    return next((text for text in documents(path)[1] if re.search(rf"^  name: {name}$", text, re.MULTILINE)), "")


def nodes(root: Path) -> dict[str, int]:
    """Return a dict from the name of each service that has a node port to its number."""
    text = (root / "manifests/minikube/kustomization.yaml").read_text()
    found = re.findall(r"{kind: Service, name: ([a-z0-9]+)}(?:\n    .*)*?/nodePort, value: (\d+)", text)
    return {name: int(port) - 30080 for name, port in found}


def numbers(root: Path) -> dict[str, int]:
    """Return a dict from the name of each service to its number, in the order of the numbers.

    A service that has no number yet, or the number of a service above it, gets the lowest free number.
    """
    names = subprocess.check_output(["sh", "scripts/services.sh", "names"], cwd=root, text=True).split()
    found: dict[str, int] = {}
    for name, number in nodes(root).items():
        if name in names and number not in found.values():
            found[name] = number
    for name in names:
        if name not in found:
            found[name] = min({*range(len(names))} - {*found.values()})
    return dict(sorted(found.items(), key=lambda item: item[1]))


# --- a copy of the repository ---


def finish(root: Path) -> None:
    """Check that no list of the copy lacks a service, and render the manifests and the chart of the copy."""
    if wrong := missing(root):
        raise RefusalError("\n".join(wrong))
    run(root, "sh", "scripts/manifests.sh", "manifests/rendered")
    run(root, sys.executable, "scripts/chart.py", "chart")


def run(root: Path, *command: str) -> None:
    """Run a command in `root`. Raise RefusalError with its output if it fails."""
    environ = {"KUBECTL": "kubectl", **os.environ}
    try:
        ended = subprocess.run(command, check=False, cwd=root, env=environ, text=True, capture_output=True)
    except FileNotFoundError:
        raise RefusalError(f"{command[0]} is needed; install the development packages: make test") from None
    if ended.returncode:
        hint = "" if shutil.which(environ["KUBECTL"]) else "\nmake: kubectl is needed: https://kubernetes.io/docs/tasks/tools/"
        raise RefusalError(f"{' '.join(command)} has failed, so nothing has changed\n{ended.stdout}{ended.stderr}{hint}".rstrip())


def files(root: Path) -> dict[str, bytes]:
    """Return the content of each file below `root`."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def transact(change: Callable[[Path], None]) -> list[str]:
    """Apply `change` to a copy of the repository. If it succeeds, change the repository in the same way, or not at all.

    Return a line for each file that was made, changed or deleted.
    """
    repository = os.open(ROOT, os.O_RDONLY)
    fcntl.flock(repository, fcntl.LOCK_EX)  # the kernel releases the lock when this process ends
    try:
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    except FileNotFoundError:
        raise RefusalError("this command needs git") from None
    except subprocess.CalledProcessError as error:
        said = f"git cannot list the files of this folder, which has to be a clone\n{error.stderr}"
        raise RefusalError(said.rstrip()) from None
    with tempfile.TemporaryDirectory(prefix="service-") as folder:
        root = Path(folder)
        for name in filter(None, listed):
            if Path(name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(name, root / name)
        before = files(root)
        change(root)
        for cache in [*root.rglob("__pycache__"), *root.rglob(".ruff_cache")]:
            shutil.rmtree(cache)
        after = files(root)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    now = {name: path.read_bytes() for name in changed if (path := Path(name)).is_file()}
    if edited := [name for name in sorted(changed) if before.get(name) != now.get(name)]:
        raise RefusalError(f"other changes were made at the same time, so nothing was changed here: {' '.join(edited)}")
    try:
        for name in changed:
            put(name, after.get(name))
    except BaseException:
        for name in changed:
            put(name, before.get(name))
        raise
    kind = {(False, True): "made", (True, True): "changed", (True, False): "deleted"}
    return [f"{kind[name in before, name in after]:8}{name}" for name in sorted(changed)]


def put(name: str, content: bytes | None) -> None:
    """Replace the file `name` atomically, or delete it, and then delete the folders that became empty."""
    path = Path(name)
    if content is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.new")
        new.write_bytes(content)
        if path.exists():
            shutil.copymode(path, new)
        new.replace(path)
        return
    path.unlink(missing_ok=True)
    for cache in path.parent.glob("__pycache__"):
        shutil.rmtree(cache)
    while path.parent != Path() and path.parent.is_dir() and not any(path.parent.iterdir()):
        path = path.parent
        path.rmdir()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
