#!/bin/sh
# Run the contract tests with the newest versions of aiohttp, redis-py and the packages that both need. If a test fails, the next
# update of these libraries breaks the service.
# Usage: test-newest.sh
# The script reads VENV, an environment that only this script uses.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/pip.sh"
[ $# = 0 ] || usage

# Install without a lock, because no lock has the newest versions yet. Install wheels only, so that no build script of a package
# runs.
pip install --quiet --only-binary :all: --upgrade aiohttp hiredis redis
pip list | grep -E '^(aiohttp|hiredis|redis) '
# First check the names that the code borrows from these libraries, because the tests below may hang if a name is gone. This check
# cannot hang, because it starts no server.
"$VENV/bin/python" -m pytest --noconftest tests/*/test_borrowed.py
"$VENV/bin/python" -m pytest tests/*/test_contract.py tests/nanoservice/test_redis.py
