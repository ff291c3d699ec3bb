# redis.sh reads this file, which the component redis-replicated adds. It replaces some functions of redis.sh, and adds commands.
# The same commands serve both containers of a pod: the server, and the Sentinel, where the variable SERVER is `sentinel`.
# Further commands of redis.sh:
#   sentinel     write Sentinel's configuration, and replace this shell with a Sentinel
#   hand-over    if this server is the primary, make another server the primary, and wait until this has happened
#   is-primary   succeed if this server is the primary

pods="redis-0 redis-1 redis-2"   # these are also the names of the pods' Services
pod=$(uname -n)
tls=/run/secrets/redis-tls       # this folder exists if TLS is used

join_users() { # FILE...: print each user with all its rights in the files; each service also has the rights of `services`
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
  if [ "${SERVER:-}" = sentinel ]; then
    join_users /etc/redis/sentinel.acl
  else
    join_users "$users" /etc/redis/replicated.acl
  fi
}

address() { # POD: print the address of the pod's Service; with TLS print its name, because the certificate is valid for names
  if [ -d "$tls" ]; then
    echo "$1"
  else
    # Add the namespace's domain, because /etc/hosts gives the pod's own name another address, which changes with each pod.
    domain=$(sed -n 's/^search \([^ ]*\).*/\1/p' /etc/resolv.conf)
    until found=$(getent hosts "$1.$domain"); do sleep 1; done
    echo "${found%%[[:space:]]*}"
  fi
}

cli() { # HOST PORT USER PASSWORD ARGUMENT...: run valkey-cli, for at most 2 s
  host=$1 port=$2 user=$3 password=$4
  shift 4
  if [ -d "$tls" ]; then set -- --tls --cacert "$tls/ca.crt" "$@"; fi
  REDISCLI_AUTH=$password timeout 2 valkey-cli -h "$host" -p "$port" --user "$user" "$@"
}

ask_sentinel() { # POD COMMAND...: send a command to the Sentinel in POD
  host=$1
  shift
  [ "$host" != "$pod" ] || host=127.0.0.1
  cli "$host" 26379 operator "$(read_passwords operator | tail -n 1)" SENTINEL "$@"
}

agreed_primary() { # print the address of the primary, if two Sentinels name the same server
  agreed=$(
    for name in $pods; do
      ask_sentinel "$name" GET-MASTER-ADDR-BY-NAME primary 2>/dev/null | {
        read -r host && read -r port && [ "$port" = 6379 ] && echo "$host"
      } &
    done | sort | uniq -d
  )
  [ "$agreed" ] && echo "$agreed"
}

accepted_password() { # USER PORT...: print the user's newest password that no other pod refuses at one of the ports
  user=$1
  shift
  for password in $(read_passwords "$user"); do
    answers=$(
      for name in $pods; do
        for port; do
          [ "$name" = "$pod" ] || cli "$name" "$port" "$user" "$password" PING 2>&1 &
        done
      done
    )
    case $answers in *WRONGPASS*) ;; *) break ;; esac
  done
  echo "$password"
}

prepare() { # before Valkey starts: find the primary, and write the configuration
  # The liveness probe must not restart a server that waits for the Sentinels, because the kubelet would wait ever longer between
  # the restarts.
  touch /run/valkey/waiting
  me=$(address "$pod")
  until primary=$(agreed_primary); do sleep 1; done
  replicas=$(for name in $pods; do ask_sentinel "$name" REPLICAS primary || true; done 2>/dev/null)
  if [ "$replicas" ]; then
    # This server may have been the primary until now. Then the Sentinels are about to promote another server, which takes them
    # some seconds. Meanwhile this server must not be a primary too: a replica that still belongs to it would confirm writes that
    # the new primary does not have. And a server that has lost its data must never be the primary.
    waited=0
    while [ "$primary" = "$me" ] && { [ $waited -lt 15 ] || [ ! -d /data/appendonlydir ]; }; do
      sleep 1
      waited=$((waited + 1))
      primary=$(agreed_primary) || primary=$me
    done
  fi
  echo "redis.sh: the primary is $primary"
  {
    cat /etc/redis/valkey.conf /etc/redis/replicated.conf
    echo "replica-announce-ip $me"
    echo "primaryuser replica"
    echo "primaryauth $(accepted_password replica 6379)"
    [ ! -d "$tls" ] || echo "tls-replication yes"
    [ "$primary" = "$me" ] || echo "replicaof $primary 6379"
  } >/run/valkey/valkey.conf   # Sentinel makes Valkey write this file again
  configuration=/run/valkey/valkey.conf
  rm /run/valkey/waiting
}

alive() { [ -e /run/valkey/waiting ] || as probe PING >/dev/null; }

ready() {
  if [ "${SERVER:-}" = sentinel ]; then
    [ "$(as probe PING)" = PONG ]
  else
    # A replica is ready when it has the primary's data. Without this, a rollout would stop the next server too early.
    case $(as probe ROLE | tr '\n' ' ') in "master "* | "slave "*" connected "*) ;; *) return 1 ;; esac
  fi
}

is_primary() { [ "$(as operator ROLE | head -n 1)" = master ]; }

hand_over() {
  # A restore restarts all servers with the restored data. No server may give its old data to another one before.
  if [ -d /data/restored ] || ! is_primary; then return; fi
  me=$(address "$pod")
  for name in $pods $pods; do   # at most 15 s
    # The primary stops accepting writes, waits until the replica has all writes, and then becomes a replica itself. Sentinel
    # refuses if no replica can take over yet.
    if [ "$(ask_sentinel "$name" FAILOVER primary COORDINATED 2>/dev/null)" = OK ]; then
      for _ in $(seq 40); do
        is_primary || break
        sleep 0.1
      done
    fi
    is_primary || break
    sleep 0.5
  done
  # Until the Sentinels name the new primary, this server tells the services which server it is.
  for _ in $(seq 5); do
    [ "$(agreed_primary)" = "$me" ] || break
    sleep 0.2
  done
}

write_sentinel() { # write Sentinel's configuration, with what Sentinel remembered in it
  for name in $pods; do echo "$name $(address "$name")"; done >addresses.new
  password=$(accepted_password sentinel 6379 26379)
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
dir /data/sentinel
sentinel announce-ip $(sed -n "s/^$pod //p" addresses.new)
sentinel announce-port 26379
sentinel down-after-milliseconds primary 2000
sentinel failover-timeout primary 3000
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
      mkdir -p /data/sentinel
      lock_volume /data/sentinel
      write_users
      write_sentinel
      exec valkey-server /data/sentinel/sentinel.conf --sentinel
      ;;
    hand-over) hand_over ;;
    is-primary) is_primary ;;
    *) usage ;;
  esac
}
