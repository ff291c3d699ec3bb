#!/bin/sh
# Fail if an old or a new Kustomize renders the manifests differently from the files in manifests/rendered/.
# Usage: manifests-check.sh
# Go builds each Kustomize, and compares its source with Go's checksum database.
# Each kubectl contains one Kustomize: kubectl 1.30 contains 5.0.4. Skaffold uses a `kustomize` on PATH instead, if there is one.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

work=$(mktemp -d)
remove_work_at_exit
for version in v5.0.0 v5.8.2; do
  GOBIN=$work/$version go install "sigs.k8s.io/kustomize/kustomize/v5@$version" \
  || fail "Kustomize $version cannot be built (see above)"
  # manifests.sh calls `kubectl kustomize FOLDER`.
  printf '#!/bin/sh\nshift\nexec "%s" build "$@"\n' "$work/$version/kustomize" >"$work/kubectl"
  chmod +x "$work/kubectl"
  KUBECTL=$work/kubectl sh "${0%/*}/manifests.sh" "$work/rendered"
  diff -r manifests/rendered "$work/rendered" \
  || fail "Kustomize $version renders other manifests (see above); if manifests/rendered/ is stale: make manifests"
done
