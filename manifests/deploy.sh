#!/bin/sh
# Take the service to a cluster, and away again: deploy.sh check | publish | deploy | undeploy
# NAMESPACE, KUBECTL, REGISTRY, IMAGE, VALKEY, ENGINE are the Makefile's variables.
set -eu
CDPATH='' cd "$(dirname "$0")/.."

fail() { echo "make: $*" >&2; exit 1; }

k() { "$KUBECTL" --namespace="$NAMESPACE" --request-timeout=30s "$@"; }

check_cluster() {
  command -v "$KUBECTL" >/dev/null || fail "kubectl is needed: https://kubernetes.io/docs/tasks/tools/"
  version=$(k version --output=json 2>/dev/null | tr -d ' \n' | sed -n 's/.*"serverVersion":{[^}]*"minor":"\([0-9]*\).*/\1/p')
  [ "$version" ] || fail "no cluster answers; start one (minikube start), or choose one (kubectl config use-context NAME)"
  [ "$version" -ge 30 ] || fail "the cluster is Kubernetes 1.$version; 1.30 is the oldest that this is checked for"
}

check_storage() {
  k get storageclass --output=jsonpath='{.items[*].metadata.annotations.storageclass\.kubernetes\.io/is-default-class}' | grep -q true \
  || fail "the cluster has no default storage class, so Redis would get no volume; mark one: kubectl annotate storageclass NAME storageclass.kubernetes.io/is-default-class=true"
}

is_there() { # whether there is the namespace; fail if it is not this service's
  # What is there has a first word, and the second only with the label.
  found=$(k get namespace "$NAMESPACE" --ignore-not-found --output=jsonpath='there {.metadata.labels.app\.kubernetes\.io/part-of}') || exit
  case "$found" in
    "") return 1 ;;
    "there hitcounter") ;;
    *) fail "the namespace $NAMESPACE is not this service's; choose another (NAMESPACE=...), or say that it is: kubectl label namespace $NAMESPACE app.kubernetes.io/part-of=hitcounter" ;;
  esac
}

check_destination() { # print how the cluster gets an image
  if [ "$REGISTRY" ]; then
    echo registry
  elif [ "$(k get nodes --selector=minikube.k8s.io/name --output=name)" ]; then
    echo minikube
  else
    case $("$KUBECTL" config current-context) in
      kind-*) echo kind ;;
      *) fail "this cluster is neither minikube nor kind, so it gets the image from a registry; name yours: REGISTRY=registry.example.com/team" ;;
    esac
  fi
}

engine() { # print the engine that makes the image
  engines=$(ENGINE=${ENGINE:-} image/build.sh engines) || exit
  echo "$engines" | head -n 1
}

publish() { # give the image to the cluster, and print its name there
  destination=$(check_destination)
  engine=$(engine)
  # By its content, so that another image is another name, and rolls the pods.
  case "${engine##*/}" in
    buildah) id=$("$engine" inspect --format '{{.FromImageID}}' "$IMAGE") ;;
    *) id=$("$engine" image inspect --format '{{.Id}}' "$IMAGE") ;;
  esac
  id=${id#sha256:}
  name=${REGISTRY:+$REGISTRY/}$IMAGE:$(echo "$id" | cut -c -12)
  "$engine" tag "$IMAGE" "$name"
  context=$("$KUBECTL" config current-context)
  case "$destination" in
    registry) "$engine" push "$name" >&2 ;;
    minikube) minikube --profile="$context" image load "$name" >&2 ;;
    kind) kind load docker-image --name "${context#kind-}" "$name" >&2 ;;
  esac
  echo "$name"
}

overlay() { # IMAGE: write a kustomization of manifests/minikube with this image; nothing else differs
  folder=$(mktemp -d manifests/.deploy.XXXXXX)
  trap 'rm -rf "$folder"' EXIT
  cat >"$folder/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: "$NAMESPACE"
resources:
  - ../minikube
images:
  - {name: hitcounter, newName: "${1%:*}", newTag: "${1##*:}"}
END
  [ -z "$VALKEY" ] || echo "  - {name: docker.io/valkey/valkey, newName: \"${VALKEY%:*}\", newTag: \"${VALKEY##*:}\"}" >>"$folder/kustomization.yaml"
}

wait_for() { # KIND/NAME: until its pods are ready
  k rollout status "$1" --timeout=180s >&2 || {
    k get pods >&2
    k get events --field-selector=type=Warning --sort-by=.lastTimestamp >&2
    fail "$1 does not get ready (see above)"
  }
}

deploy() {
  published=$(publish)   # a line of its own, else a push that fails would end nothing
  overlay "$published"
  # The namespace first, since the secrets go into it. What is restricted in it comes with the rest.
  is_there || k create --filename=- >&2 <<END
{apiVersion: v1, kind: Namespace, metadata: {name: "$NAMESPACE", labels: {app.kubernetes.io/part-of: hitcounter}}}
END
  manifests/secret.sh make >&2
  k apply --server-side --force-conflicts --kustomize="$folder" >&2
  wait_for statefulset/redis
  wait_for deployment/hitcounter
  address=$(k get nodes --output=jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}')
  echo "http://$address:30080/"
}

command=$1
case "$command" in
  check)
    check_cluster
    check_storage
    destination=$(check_destination)
    engine=$(engine)
    case "$destination:${engine##*/}" in
      registry:* | *:docker*) ;;
      *) fail "$destination takes images from Docker, not from ${engine##*/}: start Docker, or name a registry for the cluster to pull from: REGISTRY=..." ;;
    esac
    is_there || true
    ;;
  publish) publish ;;
  deploy) deploy ;;
  undeploy)
    check_cluster
    if is_there; then
      "$KUBECTL" delete namespace "$NAMESPACE" --timeout=180s
    else
      echo "there is no namespace $NAMESPACE" >&2
    fi
    ;;
esac
