#!/bin/sh
# Render each variant into one plain file, for who does not use Kustomize or wants to read what is applied: render.sh FOLDER
# RELEASE, if set, is the service's image that they name, as NAME@DIGEST.
set -eu
here=$(CDPATH='' cd "$(dirname "$0")" && pwd)
folder=$1
made_by=${RELEASE:+release-files}

render() { # NAME VARIANT [COMPONENT]
  {
    printf 'resources: [../%s]\ncomponents: [%s]\n' "$2" "${3:+../components/$3}"
    if [ "${RELEASE:-}" ]; then
      echo "images:"
      for name in hitcounter registry.example.com/hitcounter; do
        echo "  - {name: $name, newName: \"${RELEASE%@*}\", digest: \"${RELEASE#*@}\"}"
      done
    fi
  } >"$work/kustomization.yaml"
  { echo "# Made by \`make ${made_by:-manifests}\`."; "$KUBECTL" kustomize "$work"; } >"$work/$1.yaml"
}

work=$(mktemp -d "$here/.render.XXXXXX")
trap 'rm -rf "$work"' EXIT
for variant in minikube production; do
  render "$variant" "$variant"
done
[ "${RELEASE:-}" ] || render dev dev # a release has no image for developers
for component in "$here"/components/*/; do
  component=$(basename "$component")
  render "production-$component" production "$component"
done
rm "$work/kustomization.yaml"
mkdir -p "$folder"
rm -f "$folder"/*.yaml   # those of variants that there are no more
mv "$work"/*.yaml "$folder"
