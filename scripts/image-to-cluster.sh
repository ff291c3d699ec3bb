#!/bin/sh
# Give the image IMAGE to the cluster, and print its name there: image-to-cluster.sh
# Reads IMAGE, REGISTRY, ENGINE, and what lib/cluster.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"
. "${0%/*}/lib/engine.sh"

destination=$(destination)
choose_engine
# The tag follows from the content: another image has another name, so its pods are replaced.
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
