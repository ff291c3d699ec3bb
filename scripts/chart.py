"""Write those parts of the Helm chart that follow from other files of the repository.

Usage: chart.py FOLDER
FOLDER is chart/, or a copy of it. The script writes:
  manifests/   the objects of manifests/rendered/, which the templates change, and the smoke test of skaffold.yaml
  Chart.yaml   the version
  README.md    the table of the values, from the comments in values.yaml
"""

import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RENDERED = ROOT / "manifests" / "rendered"
HEADER = "# Made by `make chart`.\n"
# The values `store.kind` and `store.tls` choose one of these variants.
STORES = {
    "single": "production",
    "single-tls": "production-redis-tls",
    "replicated": "production-redis-replicated",
    "replicated-tls": "production-redis-replicated-tls",
    "outside": "production-redis-outside",
}


def main(arguments: list[str]) -> int:
    """Write the files, and return the exit status."""
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return os.EX_USAGE
    chart = Path(arguments[0])
    shutil.rmtree(chart / "manifests", ignore_errors=True)
    (chart / "manifests").mkdir()
    for name, documents in manifests().items():
        (chart / "manifests" / f"{name}.yaml").write_text(HEADER + "---\n".join(documents))
    version = re.search('^__version__ = "(.+)"', (ROOT / "nanoservice" / "__init__.py").read_text(), re.MULTILINE)
    if not version:
        raise SystemExit("make: nanoservice/__init__.py has no version")
    text = (chart / "Chart.yaml").read_text()
    text = re.sub(r"(?m)^(version|appVersion): .*", rf"\1: {version[1]}", text)
    (chart / "Chart.yaml").write_text(re.sub(r"(?m)^(icon: .*)/v[^/]+/", rf"\1/v{version[1]}/", text))
    begin, end = "<!-- the values: begin -->\n", "<!-- the values: end -->"
    before, _, rest = (chart / "README.md").read_text().partition(begin)
    (chart / "README.md").write_text(f"{before}{begin}\n{table(chart)}\n{end}{rest.partition(end)[2]}")
    return 0


def rendered(variant: str) -> list[str]:
    """Return the text of each object of a variant."""
    return (RENDERED / f"{variant}.yaml").read_text().partition("\n")[2].split("---\n")


def kind(document: str) -> str:
    """Return the kind of an object."""
    return "".join(re.findall("(?m)^kind: (.+)$", document))


def manifests() -> dict[str, list[str]]:
    """Return a dict from the name of a file of the chart to the objects in this file."""
    production, minikube = rendered("production"), rendered("minikube")
    found = {name: rendered(variant) for name, variant in STORES.items()}
    # The Deployments of the two variants differ only in the image, which a value sets.
    found["node-port"] = [it for it in minikube if it not in production and kind(it) != "Deployment"]
    found["monitoring"] = [it for it in rendered("production-monitoring") if it not in production]
    found["smoke-test"] = [smoke_test(production), *(it for it in found["node-port"] if kind(it) == "NetworkPolicy")]
    return found


def smoke_test(production: list[str]) -> str:
    """Return the job with which Skaffold tests the services, with the command from skaffold.yaml."""
    (case,) = yaml.safe_load((ROOT / "skaffold.yaml").read_text())["verify"]
    job: Any = yaml.safe_load((ROOT / case["executionMode"]["kubernetesCluster"]["jobManifestPath"]).read_text())
    name = case["container"]["image"]
    image = re.search(rf"(?m)^ *image: (\S*\b{name}\b\S*)$", "".join(production))
    job["metadata"]["labels"] = {"app.kubernetes.io/name": name}  # the values of this service apply
    (container,) = job["spec"]["template"]["spec"]["containers"]
    container |= {key: case["container"][key] for key in ("command", "args")} | {"image": image[1] if image else name}
    return yaml.dump(job, Dumper=Dumper)


class Dumper(yaml.SafeDumper):
    """A YAML dumper that writes a text of several lines as a literal block."""


Dumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)


def table(chart: Path) -> str:
    """Return a Markdown table with the name, the default and the description of each value."""
    rows = ["| value | default | description |", "| --- | --- | --- |"]
    rows += [f"| `{path}` | {f'`{default}`' if default else ''} | {comment} |" for path, default, comment in values(chart)]
    return "\n".join(rows) + "\n"


def values(chart: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the path, the default and the description of each value.

    The values of a service are an example in a comment, so that values.yaml needs no line for a service. They have no default.
    """
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in (chart / "values.yaml").read_text().splitlines():
        example = re.match("# {3}", line) is not None
        text = line[2:] if example else line
        if words := re.match(r" *# (.*)", text):
            comment.append(words[1])
        elif entry := re.match(r"( *)(\w+):(?: +(.+))?$", text):
            depth = len(entry[1])
            path = [
                *((above, name) for above, name in path if above < depth),
                (depth, "NAME" if example and depth == 2 else entry[2]),
            ]
            if comment:
                default = entry[3] or ""
                yield ".".join(name for _, name in path), "" if example else default, " ".join(comment).rstrip(".")
            comment = []
        else:
            comment = []


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
