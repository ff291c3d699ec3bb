# This file has functions that store the passwords of Redis's users in the cluster. A script sources it after lib/cluster.sh.
#
# Redis reads all passwords from the secret redis-users, which has a key for each user. Each line of a key is a valid password;
# the newest password comes first.
# A service reads only its own password, from the key `password` of the secret SERVICE-redis.
# The scripts pass passwords in files that only this user can read, because `ps` shows every command line to every user.

umask 077
work=$(mktemp -d)
remove_work_at_exit
# The users `replica` and `sentinel` exist only with the component redis-replicated. They always get passwords, so that adding
# this component needs no other step.
acl=manifests/components/redis-replicated/replicated.acl
users=$(awk '$1 == "user" && $2 != "default" && !seen[$2]++ { print $2 }' manifests/redis/users.acl $acl)
services=$(echo "$users" | grep -vx -e probe -e operator -e replica -e sentinel)

new_password() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; echo; }

read_secret() { # NAME KEY: print the passwords in KEY of the secret NAME, one on each line; print nothing if there are none
  # Write kubectl's output into a file, because a pipeline would lose kubectl's exit status. A secret that cannot be read must not
  # count as missing.
  k get secret "$1" --ignore-not-found \
    --output=go-template="{{with .data}}{{with index . \"$2\"}}{{base64decode .}}{{end}}{{end}}" >"$work/secret" || return
  # redis.sh and the services read passwords by the same rule: without a byte-order mark, carriage returns and empty lines.
  LC_ALL=C sed "1s/^$(printf '\357\273\277')//; s/$(printf '\r')*\$//" "$work/secret" | LC_ALL=C grep . || [ $? = 1 ]
}

write_secret() { # NAME FOLDER: write the files of FOLDER into the secret NAME
  # Apply the secret server-side, because a client-side apply would copy the passwords into an annotation.
  k create secret generic "$1" --from-file="$2" --dry-run=client --output=yaml \
  | k apply --server-side --force-conflicts --field-manager=hitcounter --filename=- >/dev/null
}

read_passwords() { # write each user's passwords in redis-users into the file work/users/NAME
  mkdir -p "$work/users"
  for name in $users; do
    read_secret redis-users "$name" >"$work/users/$name"
  done
}

write_services() { # write the newest password of each service's user into the service's secret, if the secret has another one
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
