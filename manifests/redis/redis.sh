# What is done beside Valkey, in its container: sh /etc/redis/redis.sh COMMAND
#   start [OPTION...]  write the users, take in what was restored, and become Valkey
#   alive, ready       the probes
#   load-users         have Valkey take the passwords as they are mounted now
#   backup             write a snapshot of this moment, compressed by gzip, to standard output
#   restore            take a snapshot from standard input; Valkey has it from its next start on, within a quarter of an hour
set -eu
umask 077

users=/etc/redis/users.acl       # the rights of each
passwords=/run/secrets/redis     # a file for each; each line of it is valid, the newest comes first

check_snapshot() { # FILE: fail, and tell why, unless it is a whole one
  report=$(valkey-check-rdb "$1" 2>&1) || { echo "$report" >&2; return 1; }
}

fail() { echo "redis.sh: $*" >&2; exit 1; }

write_users() {
  while read -r kind name rights || [ "$kind" ]; do
    [ "$kind" = user ] || continue
    hashes=
    if [ "$name" != default ]; then
      [ -s "$passwords/$name" ] || fail "the secret redis-users has no password for $name; run: make secret"
      while IFS= read -r password || [ "$password" ]; do   # the last line may have no end
        [ "$password" ] || continue                        # else no password would be one
        hashes="$hashes #$(printf %s "$password" | sha256sum | cut -c -64)"
      done <"$passwords/$name"
      rights="on$hashes $rights"
    fi
    echo "user $name $rights"
  done <"$users" >/run/valkey/users.acl.new
  mv /run/valkey/users.acl.new /run/valkey/users.acl
}

as() { # USER ARGUMENT...: valkey-cli, over the socket
  # The oldest password: while new ones are mounted and not yet loaded, it is the one that Valkey knows.
  name=$1
  shift
  REDISCLI_AUTH=$(grep . "$passwords/$name" | tail -n 1) valkey-cli -s /run/valkey/socket --user "$name" "$@"
}

command=$1
shift
case "$command" in
  start)
    cd /data
    # A pod that was deleted by force may still run, and would go on to acknowledge what this one has not read. The lock is its
    # process's until that has ended.
    exec 9>lock
    for _ in $(seq 60); do
      ! flock -n 9 || break
      sleep 1
    done
    flock -n 9 || fail "another Valkey has this volume still: its pod was deleted by force, and has not ended"
    write_users
    if [ -d restored ] && [ -d appendonlydir ] && [ -z "$(find restored -maxdepth 0 -mmin -15)" ]; then
      # Its restart was cut off. Who restarts Redis days later does not mean it.
      echo "redis.sh: what was to be restored is older than a quarter of an hour, so it is not" >&2
      rm -rf restored
    fi
    if [ -d restored ]; then
      if [ -d appendonlydir ]; then
        rm -rf before-restore
        mv appendonlydir before-restore
      fi
      mv restored appendonlydir
    fi
    exec valkey-server /etc/redis/valkey.conf "$@"
    ;;
  alive) as probe PING >/dev/null ;;               # any answer will do, also that it is loading
  ready) [ "$(as probe PING)" = PONG ] ;;
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
    gzip -c "$file"   # what is cut off on its way does not unpack
    ;;
  restore)
    cd /data
    rm -rf restored.new
    mkdir restored.new
    trap 'rm -rf restored.new' EXIT
    # The names that Valkey gives a rewritten append-only file: its base is a snapshot.
    cat >restored.new/appendonly.aof.1.base.rdb
    check_snapshot restored.new/appendonly.aof.1.base.rdb || fail "this is no snapshot of Redis; nothing has changed"
    echo "file appendonly.aof.1.base.rdb seq 1 type b" >restored.new/appendonly.aof.manifest
    rm -rf restored
    mv restored.new restored
    ;;
  *) fail "no such command: $command" ;;
esac
