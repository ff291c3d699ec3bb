#!/bin/sh
# Write a snapshot of what Redis has now to FILE: backup.sh
# Reads FILE, and what lib/cluster.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"

[ "$FILE" ] || fail "which file is to be written? make backup FILE=hitcounter.rdb"
trap 'rm -f "$FILE.new"' EXIT
trap 'exit 130' HUP INT TERM
# For kubectl, a stream that ends early is not a failure. For gunzip it is; so FILE is replaced by a whole snapshot or not at all.
kube --namespace="$NAMESPACE" exec redis-0 --container=redis -- sh /etc/redis/redis.sh backup | gunzip >"$FILE.new" || exit
mv "$FILE.new" "$FILE"
