"""Test the settings that the counter adds to the settings of every service."""

import re
from pathlib import Path

import pytest

from hitcounter.app import CounterConfig
from nanoservice.config import table, variables
from nanoservice.errors import ConfigError
from tests.support import ROOT
from tests.support.variables import OTHERS


def problems(environ: dict[str, str]) -> list[str]:
    """Return the problems that are reported for `environ`."""
    with pytest.raises(ConfigError) as caught:
        CounterConfig.read(environ)
    return caught.value.problems


def test_defaults_need_no_variable() -> None:
    config = CounterConfig.read({})
    assert (config.request_timeout, config.max_pending, config.lanes, config.idempotency_keys) == (2.0, 10000, 4, 100000)


@pytest.mark.parametrize(
    ("name", "value", "should_be"),
    [
        ("REQUEST_TIMEOUT", "10.1", "a number of seconds from 0.1 to 10"),  # a shutdown waits no longer for an answer
        ("LANES", "0", "a whole number from 1 to 64"),
        ("MAX_PENDING", "0", "a whole number from 1"),
        ("IDEMPOTENCY_KEYS", "0", "a whole number from 1"),
    ],
)
def test_report_of_a_wrong_value_says_what_is_valid(name: str, value: str, should_be: str) -> None:
    [line] = problems({"REDIS_HOST": "h", name: value})
    assert line.startswith(f"{name} must be {should_be}")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("MAX_PENDNG", "MAX_PENDING"), ("IDEMPOTENCY_KEY", "IDEMPOTENCY_KEYS"), ("LANE", "LANES"), ("LANS", "LANES")],
)
def test_misspelt_variable_is_reported_with_the_nearest_one(name: str, nearest: str) -> None:
    assert problems({name: "s3cret"}) == [f"{name} is not a setting; the nearest is {nearest}"]


def test_variables_of_other_programs_are_ignored() -> None:
    assert CounterConfig.read(dict.fromkeys(OTHERS, "x")) == CounterConfig.read({})


def test_every_variable_is_explained() -> None:
    assert all(spec.metadata["help"] for _, spec in variables(CounterConfig))


def test_table_of_the_readme_is_the_table_of_the_code() -> None:
    assert table(CounterConfig) in (ROOT / "README.md").read_text()


def test_readme_names_no_variable_that_does_not_exist() -> None:
    known = {name for name, _ in variables(CounterConfig)}
    prefixes = {name.split("_")[0] for name in known if "_" in name}
    for page in [ROOT / "README.md", *Path(ROOT / "docs").glob("*.md")]:
        named = set(re.findall(r"`([A-Z]+(?:_[A-Z]+)+)[=`]", page.read_text())) - {"REDIS_SERVICE_HOST"}
        assert {name for name in named if name.split("_")[0] in prefixes} <= known, page
