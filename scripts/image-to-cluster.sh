#!/bin/sh
# Copy the image IMAGE into the cluster, or push it to the registry REGISTRY. Print the name that the image has there.
# Usage: image-to-cluster.sh
# The script reads IMAGE, REGISTRY, ENGINE, and the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/engine.sh"

destination=$(destination)
choose_engine
# The tag is the beginning of the image's ID. So a changed image has a new name, and Kubernetes replaces the service's pods.
case "${engine##*/}" in
  buildah) id=$("$engine" inspect --format '{{.FromImageID}}' "$IMAGE") ;;
  *) id=$("$engine" image inspect --format '{{.Id}}' "$IMAGE") ;;
esac
id=${id#sha256:}
name=${REGISTRY:+$REGISTRY/}$IMAGE:$(echo "$id" | cut -c -12)
"$engine" tag "$IMAGE" "$name"
case "$destination" in
  registry) "$engine" push "$name" >&2 ;;
  minikube)
    profile=$(context)
    minikube --profile="$profile" image load "$name" >&2
    ;;
  kind)
    context=$(context)
    kind load docker-image --name "${context#kind-}" "$name" >&2
    ;;
esac
echo "$name"
