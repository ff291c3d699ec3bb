# This file has functions that call kubectl, and functions that find out which cluster kubectl reaches.
# The functions read KUBECTL, NAMESPACE, REGISTRY and SKAFFOLD_KUBE_CONTEXT. Skaffold sets SKAFFOLD_KUBE_CONTEXT if Skaffold uses
# another cluster than kubectl's current cluster.

case ${NAMESPACE:-} in
  *[!a-z0-9-]*) fail "NAMESPACE=$NAMESPACE: a namespace has only lower-case letters, digits and hyphens" ;;
esac
export KUBECTL_KUBERC=false # kubectl would take options from the user's kuberc, such as a confirmation of each `kubectl delete`
command -v "${KUBECTL:=kubectl}" >/dev/null || fail "kubectl is needed: https://kubernetes.io/docs/tasks/tools/"

kube() { # ARGUMENT...: run kubectl on the cluster
  "$KUBECTL" ${SKAFFOLD_KUBE_CONTEXT:+--context="$SKAFFOLD_KUBE_CONTEXT"} "$@"
}

context() { # print the cluster's name in the configuration of kubectl
  if [ "${SKAFFOLD_KUBE_CONTEXT:-}" ]; then echo "$SKAFFOLD_KUBE_CONTEXT"; else "$KUBECTL" config current-context; fi
}

# In a pod, kubectl without a configuration uses the pod's service account, unless it gets a time limit.
limit=30s
if [ "${KUBERNETES_SERVICE_HOST:-}" ] && ! context >/dev/null 2>&1; then limit=; fi

k() { # ARGUMENT...: run kubectl in the namespace, with a time limit for each request
  kube --namespace="$NAMESPACE" ${limit:+--request-timeout=$limit} "$@"
}

check_version() { # fail unless a cluster answers and is new enough
  version=$(k version --output=json | tr -d ' \n' | sed -n 's/.*"serverVersion":{[^}]*"minor":"\([0-9]*\).*/\1/p')
  [ "$version" ] || fail "the cluster's version cannot be read (see above): start a cluster (minikube start)," \
    "choose one (kubectl config use-context NAME), or log in"
  [ "$version" -ge 30 ] || fail "the cluster is Kubernetes 1.$version; 1.30 is the oldest that this is checked for"
}

namespace_exists() { # succeed if the namespace exists; exit if the namespace does not belong to this service
  # The output has the word `there` if the namespace exists, and then the label's value if the namespace has the label.
  found=$(k get namespace "$NAMESPACE" --ignore-not-found \
    --output=jsonpath='there {.metadata.labels.app\.kubernetes\.io/part-of}') || exit
  case "$found" in
    "") return 1 ;;
    "there hitcounter") ;;
    *)
      fail "the namespace $NAMESPACE is not this service's; choose another (NAMESPACE=...)," \
        "or label it: kubectl label namespace $NAMESPACE app.kubernetes.io/part-of=hitcounter"
      ;;
  esac
}

destination() { # print where the cluster gets an image from: registry, minikube or kind
  if [ "$REGISTRY" ]; then echo registry; return; fi
  if ! { nodes=$(k get nodes --selector=minikube.k8s.io/name --output=name) && name=$(context); }; then
    fail "it is not known what kind of cluster this is (see above); name the registry that the cluster pulls from:" \
      "REGISTRY=registry.example.com/team"
  fi
  case "$nodes $name" in
    ?*" $name") echo minikube ;;
    " kind-"*) echo kind ;;
    *)
      fail "this cluster is neither minikube nor kind, so it gets the image from a registry; name yours:" \
        "REGISTRY=registry.example.com/team"
      ;;
  esac
}

needed_components() { # print the components of the manifests that the cluster's DNS and its rules for users make necessary
  # A look-up that is not allowed finds nothing, because most clusters need no component.
  if k api-versions 2>/dev/null | grep -q '^security\.openshift\.io/'; then echo openshift; fi
  if k version 2>/dev/null | grep -q '^Server Version: .*-gke\.'; then echo dns-gke; fi
  ports=$(k get endpointslices --namespace=kube-system --selector=k8s-app=kube-dns \
    --output=jsonpath='{.items[*].ports[*].port}' 2>/dev/null) || true
  case " $ports " in *" 8053 "*) echo dns-gardener ;; esac
  columns='{.metadata.name} {.spec.template.spec.hostNetwork} {.spec.template.spec.containers[*].args}'
  caches=$(k get daemonsets --namespace=kube-system \
    --output=jsonpath="{range .items[*]}$columns{\"\\n\"}{end}" 2>/dev/null) || true
  case "$caches" in *169.254.25.10*) echo dns-kubespray ;; esac
  if echo "$caches" | grep '^node-local-dns ' | grep -qv '^node-local-dns true '; then echo dns-cilium; fi
}

redis_pods() { # print the names of the pods of Redis; with the component redis-replicated there are three
  replicas=$(k get statefulset redis --ignore-not-found --output=jsonpath='{.spec.replicas}') || exit
  [ "$replicas" ] || fail "there is no Redis in the namespace $NAMESPACE"
  for number in $(seq "$replicas"); do echo "redis-$((number - 1))"; done
}

in_pod() { # POD COMMAND [OPTION...]: run a command of redis.sh in the pod; the options are kubectl's
  pod=$1 command=$2
  shift 2
  # This has no time limit, because a snapshot may be large.
  kube --namespace="$NAMESPACE" exec "$pod" --container=redis "$@" -- sh /etc/redis/redis.sh "$command"
}

primary_pod() { # print the name of the pod whose Redis is the primary
  pods=$(redis_pods) || exit
  if [ "$pods" = redis-0 ]; then echo redis-0; return; fi
  answers=
  for pod in $pods; do
    if answer=$(in_pod "$pod" is-primary 2>&1); then echo "$pod"; return; fi
    answers="$answers$pod: $answer; "
  done
  fail "no pod of Redis in the namespace $NAMESPACE says that it is the primary (${answers%; }): kubectl get pods"
}
