"""Print the JSON Schema of a custom resource, as the API server applies it: unknown fields are refused.

Usage: python crd-schema.py FILE, where FILE is a CustomResourceDefinition.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def strict(schema: Any) -> Any:
    """Return the schema with each object closed whose fields the definition lists."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: strict(part) for name, part in schema.items()}
    if str(schema.get("pattern")).startswith("^(?i)"):
        del closed["pattern"]  # only Go accepts a flag there
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        closed.setdefault("additionalProperties", False)
    return closed


if __name__ == "__main__":
    (version,) = yaml.safe_load(Path(sys.argv[1]).read_text())["spec"]["versions"]
    print(json.dumps(strict(version["schema"]["openAPIV3Schema"])))
