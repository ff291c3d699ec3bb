#!/bin/sh
# Deploy the image IMAGE and its Redis on the cluster, wait until they are ready, and print the URL: deploy.sh
# Reads VALKEY, another image of Valkey than the manifests', and what image-to-cluster.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"

wait_for() { # KIND/NAME: until its pods are ready
  k rollout status "$1" --timeout=180s >&2 || {
    k get pods >&2
    k get events --field-selector=type=Warning --sort-by=.lastTimestamp >&2
    fail "$1 does not get ready (see above)"
  }
}

image=$(sh "${0%/*}/image-to-cluster.sh")
# manifests/minikube with these images and in this namespace; nothing else differs. Kustomize takes folders beside it alone.
work=$(mktemp -d manifests/.deploy.XXXXXX)
remove_work_at_exit
cat >"$work/kustomization.yaml" <<END
apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
namespace: "$NAMESPACE"
resources:
  - ../minikube
images:
  - {name: hitcounter, newName: "${image%:*}", newTag: "${image##*:}"}
END
if [ "$VALKEY" ]; then
  echo "  - {name: docker.io/valkey/valkey, newName: \"${VALKEY%:*}\", newTag: \"${VALKEY##*:}\"}" >>"$work/kustomization.yaml"
fi
# The namespace comes first, since the secrets go into it. What restricts it comes with the rest.
namespace_exists || k create --filename=- >&2 <<END
{apiVersion: v1, kind: Namespace, metadata: {name: "$NAMESPACE", labels: {app.kubernetes.io/part-of: hitcounter}}}
END
sh "${0%/*}/secret.sh" >&2
k apply --server-side --force-conflicts --kustomize="$work" >&2
wait_for statefulset/redis
wait_for deployment/hitcounter
address=$(k get nodes --output=jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}')
echo "http://$address:30080/"
