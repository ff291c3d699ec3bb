#!/bin/sh
# Fail if a lock (requirements.txt ...) does not follow from its requirements.in.
# Usage: lock-check.sh
# The script reads VENV, as lock.sh does.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

scripts=$(cd "${0%/*}" && pwd)
VENV=$(cd "$VENV" && pwd)
export VENV
work=$(mktemp -d)
remove_work_at_exit
mkdir -p "$work/bench" "$work/monitoring" "$work/tests/servers"
for file in requirements*.* bench/requirements.* monitoring/requirements.* tests/servers/requirements.*; do
  [ ! -e "$file" ] || cp "$file" "$work/$file"
done
(cd "$work" && sh "$scripts/lock.sh") || exit
for file in requirements*.txt bench/requirements.txt monitoring/requirements.txt tests/servers/requirements.txt; do
  [ ! -e "$file" ] || cmp -s "$file" "$work/$file" || fail "$file is stale; run: make lock"
done
