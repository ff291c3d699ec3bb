# This file has functions that deploy manifests and print the services' URLs. A script sources it after lib/cluster.sh and
# lib/services.sh.

wait_for() { # KIND/NAME: wait until the pods of KIND/NAME are ready, for at most 180 s
  k rollout status "$1" --timeout=180s >&2 || {
    k get pods >&2 || true
    k get events --field-selector=type=Warning --sort-by=.lastTimestamp >&2 || true
    fail "$1 does not become ready (see above)"
  }
}

kustomization() { # RESOURCE: print a kustomization that deploys RESOURCE in this namespace; the input has the entries of `images`
  # It adds the components that the cluster needs, and changes nothing else.
  printf '%s\n' "apiVersion: kustomize.config.k8s.io/v1beta1" "kind: Kustomization" "namespace: \"$NAMESPACE\"" \
    "resources: [$1]" "images:"
  cat
  echo "components:"
  base=${1##*/} base=${base%.yaml}
  for component in $(needed_components); do
    case $1 in *-"$component.yaml") continue ;; esac # the rendered variant has this component
    advice="; add it to manifests/production, too"
    # shellcheck disable=SC2154 # base.sh sets `program`
    if [ "$program" = install.sh ]; then advice=; fi # a bundle's files must stay as they are
    echo "$program: this cluster needs the component $component, which this command adds$advice" >&2
    # Skaffold and GitOps deploy a variant without this script, so the variant may have the component already.
    grep -q "^[^#]*/components/$component" "manifests/${base%%-*}/kustomization.yaml" || echo "  - ../components/$component"
  done
}

make_namespace() { # make the namespace if it does not exist; secret.sh needs it before the manifests are applied
  namespace_exists \
  || sed "s/^  name: .*/  name: \"$NAMESPACE\"/" manifests/namespace/namespace.yaml | k create --filename=- >&2
}

print_urls() { # NAME...: print the URL of each service, or a command if it has no URL; with several services also their names
  # A node may have two addresses, of IPv4 and IPv6. A user who may not read the nodes gets a command instead of a URL.
  addresses=$(k get nodes --output=jsonpath='{.items[0].status.addresses[?(@.type=="InternalIP")].address}') || addresses=
  address=${addresses%% *}
  case "$address" in *:*) address="[$address]" ;; esac
  for name; do
    port=$(k get service "$name" --output=jsonpath='{.spec.ports[0].nodePort}')
    host=$(k get ingress "$name" --ignore-not-found --output=jsonpath='{.spec.rules[0].host}')
    if [ "$port" ] && [ "$address" ]; then
      url=http://$address:$port/
    elif [ "$host" ]; then
      tls=$(k get ingress "$name" --output=jsonpath='{.spec.tls[0].secretName}')
      url=http${tls:+s}://$host/
    else
      url="kubectl --namespace=$NAMESPACE port-forward service/$name $((8080 + $(number "$name"))):80"
    fi
    if [ $# = 1 ]; then echo "$url"; else echo "$url $name"; fi
  done
}
