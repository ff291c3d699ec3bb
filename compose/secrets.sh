#!/bin/sh
# Make each of these secrets of compose.yaml, unless the volume /secrets already has it:
#   redis/NAME                         the password of the user NAME of Valkey, for Valkey
#   redis-tls/tls.crt, tls.key, ca.crt a certificate for the name `redis`, for Valkey
#   NAME/password, ca.crt              the password of the service NAME and the certificate of Valkey's CA, for the service
# This script runs as root without any capability. Root owns all files. Valkey and the service both mount the volume, and each
# can read only the files of its own group. All services have the same group, so one service can read another's password. On a
# cluster, it cannot.
set -eu
umask 077
cd /secrets

give() { # GROUP PATH...: let only root and GROUP read the paths
  group=$1
  shift
  chgrp "$group" "$@"
  chmod u=rwX,g=rX,o= "$@"
}

put() { # GROUP FILE PATH: move new/FILE to PATH atomically, so that nobody reads an incomplete file, and let GROUP read it
  give "$1" "new/$2"
  mv "new/$2" "$3"
}

valkey=65531 service=65532 services=
rm -rf new
mkdir -p redis redis-tls new
give $valkey redis redis-tls

while read -r kind name _ || [ "$kind" ]; do
  if [ "$kind" != user ] || [ "$name" = default ]; then continue; fi
  if [ ! -s "redis/$name" ]; then
    od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >new/password
    put $valkey password "redis/$name"
    echo "made the password of $name"
  fi
  case "$name" in
    probe | operator) ;;
    *)
      mkdir -p "$name"
      give $service "$name"
      cp "redis/$name" new/password
      put $service password "$name/password"
      services="$services $name"
      ;;
  esac
done </users.acl

certificate() { # NAME FILE [OPTION...]: make the certificate new/FILE.crt for NAME, and its private key new/FILE.key
  name=$1 file=$2
  shift 2
  openssl req -x509 -config new/openssl.cnf -extensions "$name" -subj "/CN=$name" -days 3650 -noenc \
    -newkey ec -pkeyopt ec_paramgen_curve:P-256 -keyout "new/$file.key" -out "new/$file.crt" "$@"
}

if [ ! -e redis-tls/tls.crt ]; then
  cat >new/openssl.cnf <<END
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign
subjectKeyIdentifier = hash
[redis]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = serverAuth
subjectAltName = DNS:redis
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
END
  certificate authority ca
  certificate redis tls -CA new/ca.crt -CAkey new/ca.key   # the CA's key signs only this certificate and is then deleted
  put $valkey ca.crt redis-tls/ca.crt
  put $valkey tls.key redis-tls/tls.key
  put $valkey tls.crt redis-tls/tls.crt
  echo "made the certificate of redis"
fi
for name in $services; do
  cp redis-tls/ca.crt new/ca.crt
  put $service ca.crt "$name/ca.crt"
done
rm -rf new
