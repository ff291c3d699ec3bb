"""Environments for git: without the settings of the developer who runs the tests, and with settings that change git's output."""

import os

# With these variables, git ignores the configuration of the developer who runs the tests.
ENVIRON = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}

_UNUSUAL = {"color.ui": "always", "color.grep": "always", "color.diff": "always", "diff.external": "true"} | {
    "grep.lineNumber": "true", "grep.column": "true", "submodule.recurse": "true", "status.showUntrackedFiles": "no"
}  # fmt: skip


def unusual(**settings: str) -> dict[str, str]:
    """Return the environment of a user whose settings of git change the output of many commands, with these `settings` too."""
    environ = {"GIT_CONFIG_COUNT": str(len(_UNUSUAL | settings))}
    for number, (key, value) in enumerate((_UNUSUAL | settings).items()):
        environ |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    return ENVIRON | environ
