#!/bin/sh
# Restart Redis with the snapshot FILE. Redis's volume keeps the current data, as before-restore, until the next restore.
# Usage: restore.sh
# The script reads FILE, and the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"

[ -f "$FILE" ] || fail "which file is to be restored? make restore FILE=hitcounter.rdb"
pods=$(redis_pods) || exit
# Each replica gets the snapshot too. It copies the primary's data anyway, but it may become the primary while the pods restart.
for pod in $pods; do
  in_pod "$pod" restore --stdin <"$FILE"
done
# shellcheck disable=SC2086 # each pod's name is an argument
kube --namespace="$NAMESPACE" delete pod $pods
kube --namespace="$NAMESPACE" rollout status statefulset/redis --timeout=180s
