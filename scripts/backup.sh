#!/bin/sh
# Write a snapshot of Redis's current data to the file FILE.
# Usage: backup.sh
# The script reads FILE, and the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"

[ "$FILE" ] || fail "which file is to be written? make backup FILE=hitcounter.rdb"
pod=$(primary_pod) || exit
trap 'rm -f "$FILE.new"' EXIT
trap 'exit 130' HUP INT TERM
# kubectl exec succeeds even if its stream ends early, but gunzip fails on a truncated stream. So only a complete snapshot
# replaces FILE.
in_pod "$pod" backup | gunzip >"$FILE.new" || exit
mv "$FILE.new" "$FILE"
