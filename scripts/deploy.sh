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

wait_for() { # KIND/NAME: wait until the pods of KIND/NAME are ready, for at most 180 s
  k rollout status "$1" --timeout=180s >&2 || {
    k get pods >&2 || true
    k get events --field-selector=type=Warning --sort-by=.lastTimestamp >&2 || true
    fail "$1 does not get ready (see above)"
  }
}

chosen=$(chosen)
others=$(services | grep -vxF "$chosen" | paste -s -d , -) || true
# Write a kustomization that deploys manifests/minikube with these images, in this namespace, and with the components that the
# cluster needs. It changes nothing else. Its folder is in manifests/, because Kustomize accepts bases only by relative path.
work=$(mktemp -d manifests/.deploy.XXXXXX)
remove_work_at_exit
cat >"$work/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: "$NAMESPACE"
resources:
  - ../minikube
images:
END
for name in $chosen; do
  image=$(IMAGE=${IMAGE:-$name} sh "${0%/*}/image-to-cluster.sh")
  echo "  - {name: $name, newName: \"${image%:*}\", newTag: \"${image##*:}\"}" >>"$work/kustomization.yaml"
done
if [ "$VALKEY" ]; then
  echo "  - {name: docker.io/valkey/valkey, newName: \"${VALKEY%:*}\", newTag: \"${VALKEY##*:}\"}" >>"$work/kustomization.yaml"
fi
echo "components:" >>"$work/kustomization.yaml"
for component in $(needed_components); do
  echo "make: this cluster needs the component $component, which this command adds; add it to manifests/production, too" >&2
  # Skaffold deploys manifests/minikube without this script, so the component may be there already.
  grep -q "^[^#]*/components/$component" manifests/minikube/kustomization.yaml \
  || echo "  - ../components/$component" >>"$work/kustomization.yaml"
done
# Make the namespace first, because secret.sh writes into the namespace. The manifests below add the namespace's Pod Security
# labels and its network policy.
namespace_exists || k create --filename=- >&2 <<END
apiVersion: v1
kind: Namespace
metadata:
  name: "$NAMESPACE"
  labels:
    app.kubernetes.io/part-of: hitcounter
END
sh "${0%/*}/secret.sh" >&2
k apply --server-side --force-conflicts --kustomize="$work" \
  ${others:+--selector="app.kubernetes.io/name notin ($others)"} >&2
wait_for statefulset/redis
for name in $chosen; do wait_for "deployment/$name"; done
# A node may have two addresses, of IPv4 and IPv6. A user who may not read the nodes gets a command instead of a URL.
addresses=$(k get nodes --output=jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}') || addresses=
address=${addresses%% *}
case "$address" in *:*) address="[$address]" ;; esac
for name in $chosen; do
  number=$(number "$name")
  url=http://$address:$((30080 + number))/
  [ "$address" ] || url="kubectl --namespace=$NAMESPACE port-forward service/$name $((8080 + number)):80"
  if [ "$name" = "$chosen" ]; then echo "$url"; else echo "$url $name"; fi
done
