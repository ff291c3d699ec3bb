#!/bin/sh
# Fail if a package of requirements.txt or requirements-dev.txt has no wheel for one of the platforms that people develop on.
# Usage: lock-platforms.sh
# The script reads VENV, whose Python must be the lowest that is supported. It needs a package index, and installs nothing.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/pip.sh"
[ $# = 0 ] || usage

work=$(mktemp -d)
remove_work_at_exit
# Without their hashes pip needs only the metadata of most packages. Hashes are checked by each installation.
sed -n 's/^\([a-z0-9.-]*==[^\\]*\).*/\1/p' requirements.txt requirements-dev.txt | sort -u >"$work/packages.txt"

check() { # MACHINE TAG...: fail if a package has no wheel with one of the TAGs of a platform
  machine=$1
  shift
  for tag; do
    set -- "$@" "--platform=$tag"
    shift
  done
  # pip compares the wheels with its options, but the lock's conditions with the machine that Python reports.
  "$VENV/bin/python" -I -c '
import platform, runpy, sys
machine = sys.argv.pop(1)
platform.machine = lambda: machine
runpy.run_module("pip", run_name="__main__")' \
    "$machine" --disable-pip-version-check install --quiet --dry-run --ignore-installed --no-deps --only-binary :all: \
    --target="$work/target" "$@" --requirement="$work/packages.txt" \
  || fail "a package has no wheel for $machine (see above): choose another version, or add a condition in requirements*.in"
}

manylinux() { # MACHINE: print the tags of wheels for glibc 2.28 and older
  # shellcheck disable=SC2046 # each number is an argument
  printf "manylinux_2_%s_$1 " $(seq 5 28)
  echo "manylinux1_$1 manylinux2010_$1 manylinux2014_$1"
}

# The last platform is macOS. install.sh names these platforms, too.
# shellcheck disable=SC2046 # each tag is an argument
check x86_64 $(manylinux x86_64)
# shellcheck disable=SC2046
check aarch64 $(manylinux aarch64)
check arm64 macosx_14_0_arm64
