#!/bin/sh
# Deploy SERVICE (or all services, if SERVICE is empty) and Redis on the cluster, wait until they are ready, and print the URLs.
# With SERVICE, the objects of the other services stay as they are. Redis restarts only if its manifests have changed.
# Usage: deploy.sh
# The script reads SERVICE, the variables of image-to-cluster.sh, and VALKEY: an image to use instead of the manifests' image of
# Valkey. IMAGE may be empty; the image of each service then has the service's name.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/services.sh"
. "${0%/*}/lib/deploy.sh"

chosen=$(chosen)
others=$(services | grep -vxF "$chosen" | paste -s -d , -) || true
# The folder of the kustomization is in manifests/, because Kustomize accepts bases only by relative path.
work=$(mktemp -d manifests/.deploy.XXXXXX)
remove_work_at_exit
for name in $chosen; do
  image=$(IMAGE=${IMAGE:-$name} sh "${0%/*}/image-to-cluster.sh")
  echo "  - {name: $name, newName: \"${image%:*}\", newTag: \"${image##*:}\"}" >>"$work/images"
done
if [ "$VALKEY" ]; then
  echo "  - {name: docker.io/valkey/valkey, newName: \"${VALKEY%:*}\", newTag: \"${VALKEY##*:}\"}" >>"$work/images"
fi
kustomization ../minikube <"$work/images" >"$work/kustomization.yaml"
make_namespace
sh "${0%/*}/secret.sh" >&2
k apply --server-side --force-conflicts --kustomize="$work" \
  ${others:+--selector="app.kubernetes.io/name notin ($others)"} >&2
wait_for statefulset/redis
for name in $chosen; do wait_for "deployment/$name"; done
# shellcheck disable=SC2086 # each service is an argument
print_urls $chosen
