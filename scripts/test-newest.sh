#!/bin/sh
# Run the contract tests with the newest aiohttp and redis-py, and with what they need: test-newest.sh
# It may fail: then the next update breaks what the failed test names. Reads VENV, an environment of its own that `make` made.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

# The one install without a lock: there is none for versions that nobody has looked at. Wheels only, so no build script runs.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --upgrade aiohttp hiredis redis
"$VENV/bin/python" -m pip list --disable-pip-version-check | grep -E '^(aiohttp|hiredis|redis) '
"$VENV/bin/python" -m pytest tests/*/test_borrowed.py tests/*/test_contract.py tests/nanoservice/test_redis.py
