#!/bin/sh
# Run the contract tests with the newest aiohttp and redis-py, and with the dependencies of both: test-newest.sh
# The script may fail. Then the failed test names what the next update will break.
# Reads VENV, a separate environment that make has made for this script.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

# Only this command installs without a lock: nobody has reviewed these versions yet. It accepts only wheels, so no build script
# runs.
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --upgrade aiohttp hiredis redis
"$VENV/bin/python" -m pip list --disable-pip-version-check | grep -E '^(aiohttp|hiredis|redis) '
"$VENV/bin/python" -m pytest tests/*/test_borrowed.py tests/*/test_contract.py tests/nanoservice/test_redis.py
