#!/bin/sh
# Make the passwords of Redis's users in the cluster, or rotate them: secret.sh make | rotate
# NAMESPACE, KUBECTL are the Makefile's variables. SKAFFOLD_KUBE_CONTEXT is set by Skaffold, which may have been told another cluster.
#
# Redis has all of them: in the secret redis-users a key for each user, each line of it a valid password, the newest first.
# A service has its own: in the secret SERVICE-redis, as `password`.
# They pass through files that only this user can read; on a command line, `ps` would show them.
set -eu
umask 077
CDPATH='' cd "$(dirname "$0")"

fail() { echo "make: $*" >&2; exit 1; }

k() { "$KUBECTL" ${SKAFFOLD_KUBE_CONTEXT:+--context="$SKAFFOLD_KUBE_CONTEXT"} --namespace="$NAMESPACE" --request-timeout=30s "$@"; }

users=$(awk '$1 == "user" && $2 != "default" { print $2 }' redis/users.acl)
services=$(echo "$users" | grep -vx -e probe -e operator)

new_password() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; echo; }

read_secret() { # NAME KEY: print the passwords in a key of a secret, a line each, whoever made it; nothing if there are none
  # By way of a file: a failure to read is not "none".
  k get secret "$1" --ignore-not-found --output=go-template="{{with .data}}{{with index . \"$2\"}}{{base64decode .}}{{end}}{{end}}" >"$work/secret" || return
  grep . "$work/secret" || [ $? = 1 ]
}

write_secret() { # NAME FOLDER: have the secret hold the folder's files
  # Server-side: the client's own way would leave a copy of it all in an annotation.
  k create secret generic "$1" --from-file="$2" --dry-run=client --output=yaml \
  | k apply --server-side --force-conflicts --field-manager=hitcounter --filename=- >/dev/null
}

read_passwords() { # put what redis-users has into a file each
  mkdir -p "$work/users"
  for name in $users; do
    read_secret redis-users "$name" >"$work/users/$name"
  done
}

write_services() { # have each service hold the newest password of its user, if it does not yet
  for name in $services; do
    folder=$work/services/$name
    mkdir -p "$folder"
    head -n 1 "$work/users/$name" >"$folder/password"
    read_secret "$name-redis" password >"$work/read"
    if cmp -s "$work/read" "$folder/password"; then continue; fi
    write_secret "$name-redis" "$folder"
    echo "wrote the secret $name-redis"
  done
}

load() { # have Redis take what redis-users has now
  # A change of the pod makes its kubelet look at once; by itself it would take a minute or two.
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
  fail "the pod redis-0 does not see the new passwords. What was valid still is; run this again when it is well: kubectl describe pod redis-0"
}

make_secret() {
  k get namespace "$NAMESPACE" >/dev/null 2>&1 || fail "there is no namespace $NAMESPACE; run: kubectl apply --kustomize=manifests/namespace"
  read_passwords
  missing=
  for name in $users; do
    [ ! -s "$work/users/$name" ] || continue
    # One that its service has already, say that of a Redis elsewhere, is taken over.
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
}

rotate() { # each step leaves all working, and may be done again
  k get pod redis-0 >/dev/null 2>&1 || fail "there is no pod redis-0 in the namespace $NAMESPACE to rotate the passwords of"
  read_passwords
  for name in $users; do
    [ -s "$work/users/$name" ] || fail "the secret redis-users has no password for $name; run: make secret"
    [ "$(wc -l <"$work/users/$name")" -eq 1 ] || continue   # a rotation that was cut short: go on with its new password
    { new_password; cat "$work/users/$name"; } >"$work/new"
    mv "$work/new" "$work/users/$name"
  done
  write_secret redis-users "$work/users"
  load
  echo "Redis takes the new passwords, and the old ones still"
  write_services
  # New pods, so that each has connected with the new one.
  for name in $services; do
    there=$(k get deployment "$name" --ignore-not-found --output=name)
    [ "$there" ] || continue   # it is not deployed yet, and finds the new one when it is
    k rollout restart "deployment/$name" >/dev/null
    k rollout status "deployment/$name" --timeout=180s >/dev/null || fail "the new pods of $name do not get ready; nothing is lost, run this again when they do"
  done
  echo "every service has connected with the new one"
  for name in $users; do
    head -n 1 "$work/users/$name" >"$work/new"
    mv "$work/new" "$work/users/$name"
  done
  write_secret redis-users "$work/users"
  load
  echo "Redis takes the new ones alone"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
case "$1" in
  make) make_secret ;;
  rotate) rotate ;;
esac
