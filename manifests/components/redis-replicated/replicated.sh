# redis.sh reads this file, which the component redis-replicated adds. It changes some functions of redis.sh, and adds commands.
# Further commands of redis.sh:
#   sentinel     write Sentinel's configuration, and replace this shell with a Sentinel
#   hand-over    if this server is the primary, make another server the primary, and wait until this has happened
#   is-primary   succeed if this server is the primary

servers="redis-0 redis-1 redis-2"
sentinels="redis-sentinel-0 redis-sentinel-1 redis-sentinel-2"
tls=/run/secrets/redis-tls   # this folder exists if the component redis-tls is used
pod=$(uname -n)

join_users() { # FILE...: print each user in the files, with the rights of all its lines; give each service the rights of `services`
  for name in $(sed -n 's/^user \([^ ]*\).*/\1/p' "$users" "$@" | sort -u); do
    rights=$(sed -n "s/^user $name //p" "$@" | tr '\n' ' ')
    case $name in
      default | probe | operator | replica | sentinel) ;;
      *) rights="$rights $(sed -n 's/^services //p' "$@")" ;;
    esac
    [ -z "$rights" ] || echo "user $name $rights"
  done
}

list_users() { # print the users and their rights, as an ACL file without passwords
  case $pod in
    redis-sentinel-*) join_users /etc/redis/sentinel.acl ;;
    *) join_users "$users" /etc/redis/replicated.acl ;;
  esac
}

address() { # NAME: print the address of the Service NAME; with TLS print NAME, because the certificate is valid for names
  if [ -d "$tls" ]; then
    echo "$1"
  else
    until found=$(getent hosts "$1"); do sleep 1; done
    echo "${found%%[[:space:]]*}"
  fi
}

cli() { # HOST PORT USER PASSWORD ARGUMENT...: run valkey-cli, for at most 2 s
  host=$1 port=$2 user=$3 password=$4
  shift 4
  if [ -d "$tls" ]; then set -- --tls --cacert "$tls/ca.crt" "$@"; fi
  REDISCLI_AUTH=$password timeout 2 valkey-cli -h "$host" -p "$port" --user "$user" "$@"
}

ask_sentinel() { # NAME COMMAND...: send a command to the Sentinel NAME
  name=$1
  shift
  cli "$name" 26379 operator "$(read_passwords operator | tail -n 1)" SENTINEL "$@"
}

agreed_primary() { # print the address of the primary, if two Sentinels name the same server
  agreed=$(
    for name in $sentinels; do
      ask_sentinel "$name" GET-MASTER-ADDR-BY-NAME primary 2>/dev/null | {
        read -r host && read -r port && [ "$port" = 6379 ] && echo "$host"
      } &
    done | sort | uniq -d
  )
  [ -z "$agreed" ] || echo "$agreed"
}

accepted_password() { # USER NAME:PORT...: print the user's newest password that none of the servers NAME:PORT refuses
  user=$1
  shift
  for password in $(read_passwords "$user"); do
    answers=$(for server; do cli "${server%:*}" "${server#*:}" "$user" "$password" PING 2>&1 & done)
    case $answers in *WRONGPASS*) ;; *) break ;; esac
  done
  echo "$password"
}

prepare() { # before Valkey starts: find the primary, and write the configuration
  # The liveness probe must not restart a server that waits for the Sentinels, because the kubelet would wait ever longer between
  # the restarts.
  touch /run/valkey/waiting
  me=$(address "$pod")
  until primary=$(agreed_primary) && [ "$primary" ]; do sleep 1; done
  echo "redis.sh: the primary is $primary"
  {
    cat /etc/redis/valkey.conf /etc/redis/replicated.conf
    echo "replica-announce-ip $me"
    echo "primaryuser replica"
    echo "primaryauth $(accepted_password replica $(printf '%s:6379 ' $servers))"
    [ ! -d "$tls" ] || echo "tls-replication yes"
    [ "$primary" = "$me" ] || echo "replicaof $primary 6379"
  } >/run/valkey/valkey.conf   # Sentinel makes Valkey write this file again
  configuration=/run/valkey/valkey.conf
  rm /run/valkey/waiting
}

alive() { [ -e /run/valkey/waiting ] || as probe PING >/dev/null; }

ready() {
  case $pod in
    redis-sentinel-*) [ "$(as probe PING)" = PONG ] ;;
    # A replica is ready when it has the primary's data. Without this, a rollout would stop the next server too early.
    *) case $(as probe ROLE | tr '\n' ' ') in "master "* | "slave "*" connected "*) ;; *) return 1 ;; esac ;;
  esac
}

is_primary() { [ "$(as operator ROLE | head -n 1)" = master ]; }

hand_over() {
  # A restore restarts all servers with the restored data. No server may give its old data to another one before.
  if [ -d /data/restored ] || ! is_primary; then return; fi
  me=$(address "$pod")
  for name in $sentinels $sentinels $sentinels; do   # at most 15 s
    # The primary stops to accept writes, waits until the replica has all writes, and then becomes a replica itself. Sentinel
    # refuses if no replica can take over yet.
    if [ "$(ask_sentinel "$name" FAILOVER primary COORDINATED 2>&1)" = OK ]; then
      for _ in $(seq 40); do
        is_primary || break
        sleep 0.1
      done
    fi
    is_primary || break
    sleep 1
  done
  # Until the Sentinels name the new primary, this server tells the services which server it is.
  for _ in $(seq 5); do
    [ "$(agreed_primary)" = "$me" ] || break
    sleep 0.2
  done
}

write_sentinel() { # write Sentinel's configuration, with what Sentinel remembered in it
  # shellcheck disable=SC2046 # each server is an argument
  password=$(accepted_password sentinel $(printf '%s:6379 ' $servers) $(printf '%s:26379 ' $sentinels))
  for name in $servers $sentinels; do echo "$name $(address "$name")"; done >addresses.new
  {
    if [ -s sentinel.conf ]; then
      # Sentinel writes addresses into its configuration. Replace those that have changed since, because a Service was made again.
      changes=$(while read -r name old; do
        echo "s/ $(echo "$old" | sed 's/\./\\./g') / $(sed -n "s/^$name //p" addresses.new) /g"
      done <addresses)
      sed -nE '/^sentinel (myid|current-epoch|monitor|config-epoch|leader-epoch|known-replica|known-sentinel) /p' sentinel.conf \
      | sed "$changes" | sort -s -k 2,2r   # `monitor` must come before the lines that name the primary
    else
      echo "sentinel monitor primary $(sed -n 's/^redis-0 //p' addresses.new) 6379 2"
    fi
    if [ -d "$tls" ]; then
      echo "port 0"
      echo "tls-port 26379"
      echo "tls-cert-file $tls/tls.crt"
      echo "tls-key-file $tls/tls.key"
      echo "tls-ca-cert-file $tls/ca.crt"
      echo "tls-auth-clients no"
      echo "tls-replication yes"
      echo "sentinel resolve-hostnames yes"
      echo "sentinel announce-hostnames yes"
    else
      echo "port 26379"
    fi
    cat <<END
unixsocket /run/valkey/socket
unixsocketperm 700
protected-mode no
aclfile /run/valkey/users.acl
dir /data
sentinel announce-ip $(sed -n "s/^$pod //p" addresses.new)
sentinel announce-port 26379
sentinel down-after-milliseconds primary 2000
sentinel failover-timeout primary 10000
sentinel parallel-syncs primary 2
sentinel auth-user primary sentinel
sentinel auth-pass primary $password
sentinel sentinel-user sentinel
sentinel sentinel-pass $password
END
  } >sentinel.conf.new
  mv sentinel.conf.new sentinel.conf
  mv addresses.new addresses
}

further() { # COMMAND: run a command that redis.sh does not have
  case "$1" in
    sentinel)
      lock_data
      write_users
      write_sentinel
      exec valkey-server /data/sentinel.conf --sentinel
      ;;
    hand-over) hand_over ;;
    is-primary) is_primary ;;
    *) fail "unknown command: $1" ;;
  esac
}
