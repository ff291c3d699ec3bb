#!/bin/sh
# Run the tests of the scripts with the tools of busybox, dash and original-awk in place of GNU's. macOS and Alpine have no GNU
# tools either, so a script that needs an option of GNU's tools fails here.
# Usage: test-busybox.sh FOLDER
#   FOLDER  has these three programs
# The script reads VENV.
. "${0%/*}/lib/base.sh"
[ $# = 1 ] || usage

folder=$(cd "$1" && pwd)
work=$(mktemp -d)
remove_work_at_exit
link() { # PROGRAM NAME: let NAME run PROGRAM
  ln -sf "$1" "$work/$2"
}
for name in $("$folder/busybox" --list); do link "$folder/busybox" "$name"; done
rm "$work/sha256sum" # macOS has shasum instead
for name in bash curl git go kubectl make openssl shasum ssh-keygen; do
  ! program=$(command -v $name) || link "$program" "$name"
done
link "$folder/dash" sh
link "$folder/original-awk" awk
PATH=$work "$VENV/bin/python" -m pytest -n 4 --dist worksteal tests/delivery \
  --ignore=tests/delivery/test_manifests.py # these tests run no script
