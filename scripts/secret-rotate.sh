#!/bin/sh
# Replace the passwords of Redis's users by new passwords, without a failed request. With SERVICE, replace only the password of
# this service, and leave the pods of the other services alone.
# The service works after each step, and each step may be repeated. So if the script is interrupted, run the script again.
# Usage: secret-rotate.sh
# The script reads SERVICE, and the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/passwords.sh"

load() { # make each Redis, and each Sentinel, load the passwords that the secret redis-users has now
  # Change the pods' annotation: the kubelet then updates the mounted secret at once, instead of after a minute or two.
  # shellcheck disable=SC2086 # each pod's name is an argument
  k annotate pod $pods --overwrite "passwords-changed=$(date +%s)" >/dev/null
  # shellcheck disable=SC2086 # each user's name is an argument
  (cd "$work/users" && cat $users) >"$work/wanted" || exit
  for pod in $pods; do
    for container in $(k get pod "$pod" --output=jsonpath='{.spec.containers[*].name}'); do
      load_in "$pod" --container="$container"
    done
  done
}

load_in() { # POD OPTION: make the server in the container that OPTION names load the passwords
  for _ in $(seq 120); do
    # shellcheck disable=SC2086,SC2016 # each user's name is an argument; the pod's shell expands "$@"
    if k exec "$@" -- sh -c 'cd /run/secrets/redis && cat "$@"' sh $users | cmp -s - "$work/wanted"; then
      k exec "$@" -- sh /etc/redis/redis.sh load-users
      return
    fi
    sleep 1
  done
  fail "the pod $1 does not see the new passwords. The passwords that were valid still are." \
    "Run this again when the pod is well: kubectl describe pod $1"
}

restart() { # KIND/NAME WHAT: replace the pods of KIND/NAME
  k rollout restart "$1" >/dev/null
  k rollout status "$1" --timeout=300s >/dev/null \
  || fail "the new pods of $2 do not get ready; nothing is lost, run this again when they do"
}

k get pod redis-0 >/dev/null || fail "no password can be rotated without the pod redis-0 in the namespace $NAMESPACE (see above)"
pods=$(redis_pods) || exit
read_passwords
if [ "${SERVICE:-}" ]; then
  echo "$services" | grep -qxF "$SERVICE" || fail "SERVICE=$SERVICE: manifests/redis/users.acl has no user of this name"
  users_to_rotate=$SERVICE services=$SERVICE
else
  users_to_rotate=$users
fi
for name in $users; do
  [ -s "$work/users/$name" ] || fail "the secret redis-users has no password for $name; run: make secret"
done
for name in $users_to_rotate; do
  # If a user already has two passwords, an earlier rotation was interrupted: continue with its new password.
  [ "$(wc -l <"$work/users/$name")" -eq 1 ] || continue
  { new_password; cat "$work/users/$name"; } >"$work/new"
  mv "$work/new" "$work/users/$name"
done
write_secret redis-users "$work/users"
load
echo "Redis accepts the new passwords, and still the old ones"
write_services
# Replace the pods of each service. A new pod is ready only when it has connected to Redis with the new password.
for name in $services; do
  deployed=$(k get deployment "$name" --ignore-not-found --output=name)
  [ "$deployed" ] || continue # a service that is deployed later starts with the new password
  restart "deployment/$name" "$name"
done
echo "every service has connected with its new password"
if [ "$pods" != redis-0 ] && [ -z "${SERVICE:-}" ]; then
  # The servers and the Sentinels read the passwords with which they connect to each other only when they start.
  restart statefulset/redis Redis
  echo "every server and every Sentinel has connected with its new password"
fi
for name in $users_to_rotate; do
  head -n 1 "$work/users/$name" >"$work/new"
  mv "$work/new" "$work/users/$name"
done
write_secret redis-users "$work/users"
load
echo "Redis accepts the new passwords only"
