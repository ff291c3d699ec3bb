#!/bin/sh
# Make the passwords of Redis's users in the cluster, those that are missing: secret.sh
# Reads what lib/cluster.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/passwords.sh"

k get namespace "$NAMESPACE" >/dev/null 2>&1 \
|| fail "there is no namespace $NAMESPACE; run: kubectl apply --kustomize=manifests/namespace"
read_passwords
missing=
for name in $users; do
  [ ! -s "$work/users/$name" ] || continue
  # If its service has a password already, such as that of a Redis elsewhere, redis-users takes that one over.
  read_secret "$name-redis" password >"$work/read"
  head -n 1 "$work/read" >"$work/users/$name"
  [ -s "$work/users/$name" ] || new_password >"$work/users/$name"
  missing="$missing $name"
done
if [ "$missing" ]; then
  write_secret redis-users "$work/users"
  echo "wrote the secret redis-users: passwords for$missing"
fi
write_services
