#!/bin/sh
# Fail unless the cluster can run the service. make runs this script before it builds or changes anything.
# Usage: deploy-check.sh
# The script reads SERVICE, REGISTRY, ENGINE, and the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/engine.sh"
. "${0%/*}/lib/services.sh"

check_version
# A user of one namespace may perhaps not read what belongs to the whole cluster. Then kubectl says so, and the check is left out.
default='{.items[*].metadata.annotations.storageclass\.kubernetes\.io/is-default-class}'
if ! classes=$(k get storageclass --output=jsonpath="$default"); then
  echo "make: so it is not known whether there is a default storage class, which Redis needs" >&2
elif [ "$classes" = "${classes#*true}" ]; then
  fail "the cluster has no default storage class, so Redis would get no volume; mark one:" \
    "kubectl annotate storageclass NAME storageclass.kubernetes.io/is-default-class=true"
fi
chosen=$(chosen)
ports='{range .items[*]}{.metadata.namespace} {.metadata.name}{range .spec.ports[*]} {.nodePort}{end}{"\n"}{end}'
if ! used=$(k get services --all-namespaces --output=jsonpath="$ports"); then
  echo "make: so it is not known whether another service has a node port that this deployment needs" >&2
else
  for name in $chosen; do
    number=$(number "$name")
    port=$((30080 + number))
    user=$(echo "$used" | awk -v own="$NAMESPACE $name" -v port="$port" '
      ($1 " " $2) != own { for (i = 3; i <= NF; i++) if ($i == port) print "service " $2 " in the namespace " $1 }')
    [ -z "$user" ] || fail "$name needs the node port $port, which belongs to the $user: delete that one," \
      "or change the port in manifests/minikube/kustomization.yaml"
  done
fi
destination=$(destination)
choose_engine
case "$destination:${engine##*/}" in
  registry:* | *:docker*) ;;
  *)
    why_not_docker
    fail "$destination takes images from Docker, not from ${engine##*/}: start Docker," \
      "or name a registry for the cluster to pull from: REGISTRY=..."
    ;;
esac
namespace_exists || true
