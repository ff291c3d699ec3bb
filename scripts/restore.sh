#!/bin/sh
# Restart Redis with the snapshot FILE. Redis's volume keeps the current data, as before-restore, until the next restore.
# Usage: restore.sh
# The script reads FILE, and the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"

[ -f "$FILE" ] || fail "which file is to be restored? make restore FILE=hitcounter.rdb"
kube --namespace="$NAMESPACE" exec redis-0 --container=redis --stdin -- sh /etc/redis/redis.sh restore <"$FILE"
kube --namespace="$NAMESPACE" delete pod redis-0
kube --namespace="$NAMESPACE" rollout status statefulset/redis --timeout=180s
