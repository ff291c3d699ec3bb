#!/bin/sh
# Write each lock (requirements.txt ...) from its requirements.in again: lock.sh
# Reads VENV, the environment that has pip-compile, and UPGRADE: `--upgrade` takes the newest versions.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

# pip-compile resolves for the Python that runs it. What 3.11 needs, newer ones install too, but not the other way round.
"$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
|| fail "locks are made on Python 3.11; run: make PYTHON=python3.11 VENV=.venv-3.11 ..."

for name in requirements requirements-dev bench/requirements; do
  # Renovate runs the command that it reads in a lock's first lines, with the options that it knows.
  command="pip-compile --allow-unsafe --generate-hashes --no-emit-index-url --output-file=${name##*/}.txt"
  command="$command --strip-extras ${name##*/}.in"
  # shellcheck disable=SC2086 # no argument if it is empty
  CUSTOM_COMPILE_COMMAND=$command \
  "$VENV/bin/pip-compile" --quiet --generate-hashes --strip-extras --allow-unsafe --no-emit-options \
    ${UPGRADE:-} --output-file="$name.txt" "$name.in"
done
