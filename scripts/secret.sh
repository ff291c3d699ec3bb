#!/bin/sh
# Make the missing passwords of Redis's users in the cluster.
# Usage: secret.sh
# The script reads the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/passwords.sh"

if ! said=$(k get namespace "$NAMESPACE" 2>&1 >/dev/null); then
  case "$said" in
    *"(NotFound)"*) fail "there is no namespace $NAMESPACE; run: kubectl apply --kustomize=manifests/namespace" ;;
    *) echo "$said" >&2 ;; # a user who may write secrets may perhaps not read the namespace
  esac
fi
read_passwords
missing=
for name in $users; do
  [ ! -s "$work/users/$name" ] || continue
  # If the user's service already has a password (for a Redis outside the cluster, say), write this password into redis-users.
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
