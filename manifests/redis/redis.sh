# This script starts and operates Valkey in its container.
# Usage: sh /etc/redis/redis.sh COMMAND
#   start [OPTION...]  write the users' file, put a restored snapshot in place, and replace this shell with Valkey
#   alive, ready       run the liveness or the readiness probe
#   load-users         make Valkey load the passwords that are mounted now
#   backup             take a snapshot now, compress the snapshot with gzip, and write it to standard output
#   restore            read a snapshot from standard input; Valkey loads the snapshot if Valkey starts again within 15 minutes
set -eu
umask 077

users=/etc/redis/users.acl     # this file has the name and the rights of each user
# This folder has one file for each user. Each line of a file is a valid password, and the first line is the newest password.
passwords=/run/secrets/redis

check_snapshot() { # FILE: if FILE is not a complete snapshot, print the reason and fail
  report=$(valkey-check-rdb "$1" 2>&1) || { echo "$report" >&2; return 1; }
}

fail() { echo "redis.sh: $*" >&2; exit 1; }

usage() { # print the comment at the head of this script, and exit with 64, the status for wrong usage in sysexits.h
  sed -n -e '/^#/!q' -e p "$0" >&2
  exit 64
}

read_passwords() { # NAME: print the user's passwords, the newest first
  # Strip the byte-order mark and the carriage returns that some editors add. An empty line must not become a valid password.
  # Services and `make secret` read passwords by the same rule.
  LC_ALL=C sed "1s/^$(printf '\357\273\277')//; s/$(printf '\r')*\$//; /^\$/d" "$passwords/$1"
}

list_users() { cat "$users"; }

write_users() {
  list_users >/run/valkey/users.list
  while read -r kind name rights || [ "$kind" ]; do
    [ "$kind" = user ] || continue
    hashes=
    if [ "$name" != default ]; then
      hashes=$(read_passwords "$name" | while IFS= read -r password || [ "$password" ]; do   # the last line may have no newline
        printf " #%s" "$(printf %s "$password" | sha256sum | cut -c -64)"
      done)
      [ "$hashes" ] || fail "the secret redis-users has no password for $name; run: make secret"
      rights="on$hashes $rights"
    fi
    echo "user $name $rights"
  done </run/valkey/users.list >/run/valkey/users.acl.new
  mv /run/valkey/users.acl.new /run/valkey/users.acl
}

as() { # USER ARGUMENT...: run valkey-cli as USER, over the socket
  # Use the oldest password, which is on the last line. Valkey accepts this password even if newer passwords are mounted that
  # Valkey has not loaded yet.
  name=$1
  shift
  REDISCLI_AUTH=$(read_passwords "$name" | tail -n 1) valkey-cli -s /run/valkey/socket --user "$name" "$@"
}

alive() { as probe PING >/dev/null; }   # any answer is enough, even the error that Valkey is loading its data
ready() { [ "$(as probe PING)" = PONG ]; }
prepare() { :; }
further() { usage; }
configuration=/etc/redis/valkey.conf

lock_volume() { # FOLDER: enter FOLDER of the volume, and take its lock
  cd "$1"
  # Each Valkey holds the lock of its volume until it exits. Wait for this lock: after a pod was deleted by force, the pod's
  # Valkey may still run. Without the wait, this old Valkey would acknowledge writes that the new Valkey never reads.
  exec 9>lock
  for _ in $(seq 60); do
    ! flock -n 9 || break
    sleep 1
  done
  flock -n 9 || fail "another Valkey still uses this volume: its pod was deleted by force, and its process has not exited"
}

if [ -e /etc/redis/replicated.sh ]; then
  # The component redis-replicated adds this file, which replaces some of the functions above.
  # shellcheck source=../components/redis-replicated/replicated.sh
  . /etc/redis/replicated.sh
fi

[ $# -gt 0 ] || usage
command=$1
shift
case "$command" in
  start)
    lock_volume /data
    write_users
    if [ -d restored ] && [ -d appendonlydir ] && [ -z "$(find restored -maxdepth 0 -mmin -15)" ]; then
      # The restore was interrupted before Valkey's restart. A restart days later must not complete that restore.
      echo "redis.sh: the snapshot to restore is older than 15 minutes, so it is ignored" >&2
      rm -rf restored
    fi
    if [ -d restored ]; then
      if [ -d appendonlydir ]; then
        rm -rf before-restore
        mv appendonlydir before-restore
      fi
      mv restored appendonlydir
    fi
    prepare
    exec valkey-server "$configuration" "$@"
    ;;
  alive) alive ;;
  ready) ready ;;
  load-users)
    write_users
    answer=$(as operator ACL LOAD)
    [ "$answer" = OK ] || fail "the users were not loaded: $answer"
    ;;
  backup)
    file=$(mktemp /tmp/backup.XXXXXX)
    trap 'rm -f "$file"' EXIT
    as operator --rdb "$file" >&2
    check_snapshot "$file"
    gzip -c "$file"   # the copy is compressed, because gunzip finds out whether a copy is complete
    ;;
  restore)
    cd /data
    rm -rf restored.new
    mkdir restored.new
    trap 'rm -rf restored.new' EXIT
    # Make the snapshot the base of an append-only file. Valkey gives the files of a rewritten append-only file these names.
    cat >restored.new/appendonly.aof.1.base.rdb
    check_snapshot restored.new/appendonly.aof.1.base.rdb || fail "this is not a snapshot of Redis; nothing has changed"
    echo "file appendonly.aof.1.base.rdb seq 1 type b" >restored.new/appendonly.aof.manifest
    rm -rf restored
    mv restored.new restored
    ;;
  *) further "$command" ;;
esac
