#!/bin/sh
# Render each variant into one plain file, for who does not use Kustomize or wants to read what is applied: render.sh FOLDER
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$1

render() { # NAME KUSTOMIZATION
  { echo "# Made by \`make manifests\`."; "$KUBECTL" kustomize "$2"; } >"$folder/$1.yaml.new"
  mv "$folder/$1.yaml.new" "$folder/$1.yaml"
}

mkdir -p "$folder"
rm -f "$folder"/*.yaml
for variant in minikube dev production; do
  render "$variant" "$here/$variant"
done
work=$(mktemp -d "$here/.render.XXXXXX")
trap 'rm -rf "$work"' EXIT
for component in "$here"/components/*/; do
  component=$(basename "$component")
  printf 'resources: [../production]\ncomponents: [../components/%s]\n' "$component" >"$work/kustomization.yaml"
  render "production-$component" "$work"
done
