#!/bin/sh
# Replace the passwords of Redis's users by new ones, without a failed request: secret-rotate.sh
# Each step leaves everything working, and may be repeated.
# Reads what lib/cluster.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/passwords.sh"

load() { # have Redis load the passwords that redis-users has now
  # A change of the pod makes its kubelet update the mounted secret at once; without it, that takes a minute or two.
  k annotate pod redis-0 --overwrite "passwords-changed=$(date +%s)" >/dev/null
  # shellcheck disable=SC2086 # a word each
  (cd "$work/users" && cat $users) >"$work/wanted" || exit
  for _ in $(seq 120); do
    # shellcheck disable=SC2086,SC2016 # a word each; the variable is the pod's
    if k exec redis-0 --container=redis -- sh -c 'cd /run/secrets/redis && cat "$@"' sh $users | cmp -s - "$work/wanted"; then
      k exec redis-0 --container=redis -- sh /etc/redis/redis.sh load-users
      return
    fi
    sleep 1
  done
  fail "the pod redis-0 does not see the new passwords. The passwords that were valid still are." \
    "Run this again when the pod is well: kubectl describe pod redis-0"
}

k get pod redis-0 >/dev/null 2>&1 || fail "there is no pod redis-0 in the namespace $NAMESPACE whose passwords could be rotated"
read_passwords
for name in $users; do
  [ -s "$work/users/$name" ] || fail "the secret redis-users has no password for $name; run: make secret"
  # Two passwords are those of a rotation that was interrupted: go on with its new one.
  [ "$(wc -l <"$work/users/$name")" -eq 1 ] || continue
  { new_password; cat "$work/users/$name"; } >"$work/new"
  mv "$work/new" "$work/users/$name"
done
write_secret redis-users "$work/users"
load
echo "Redis accepts the new passwords, and still the old ones"
write_services
# New pods, so that each has connected with the new password.
for name in $services; do
  deployed=$(k get deployment "$name" --ignore-not-found --output=name)
  [ "$deployed" ] || continue # it finds the new password when it is deployed
  k rollout restart "deployment/$name" >/dev/null
  k rollout status "deployment/$name" --timeout=180s >/dev/null \
  || fail "the new pods of $name do not get ready; nothing is lost, run this again when they do"
done
echo "every service has connected with its new password"
for name in $users; do
  head -n 1 "$work/users/$name" >"$work/new"
  mv "$work/new" "$work/users/$name"
done
write_secret redis-users "$work/users"
load
echo "Redis accepts the new passwords only"
