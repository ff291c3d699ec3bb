#!/bin/sh
# Render each variant of the manifests into one plain file in FOLDER, to read or to apply without Kustomize.
# Usage: manifests.sh FOLDER
# The script reads KUBECTL and RELEASE. If RELEASE (SERVICE=NAME@DIGEST, for each service) is set, the files are for a release,
# and name these images.
. "${0%/*}/lib/base.sh"
[ $# = 1 ] || usage
folder=$1
if [ "${RELEASE:-}" ]; then made_by=release-files; else made_by=manifests; fi

render() { # NAME VARIANT [COMPONENT]: render VARIANT, with COMPONENT, into work/NAME.yaml
  # Add the component to a copy of the variant, so that the variant's namespace and labels apply to the component's objects too.
  cp -r "manifests/$2" "$work/variant"
  sed 's|\.\./|../../|g' "manifests/$2/kustomization.yaml" >"$work/variant/kustomization.yaml"
  if [ "${3:-}" ]; then printf 'components: [../../components/%s]\n' "$3" >>"$work/variant/kustomization.yaml"; fi
  {
    echo "resources: [variant]"
    if [ "${RELEASE:-}" ]; then
      echo "images:"
      for image in $RELEASE; do
        for name in "${image%%=*}" "registry.example.com/${image%%=*}"; do
          echo "$name ${image#*=}" | sed 's/\(.*\) \(.*\)@\(.*\)/  - {name: \1, newName: "\2", digest: "\3"}/'
        done
      done
    fi
  } >"$work/kustomization.yaml"
  { echo "# Made by \`make $made_by\`."; "$KUBECTL" kustomize "$work"; } >"$work/$1.yaml"
  rm -r "$work/variant"
}

work=$(mktemp -d manifests/.render.XXXXXX)
remove_work_at_exit
for variant in minikube production; do
  render "$variant" "$variant"
done
[ "${RELEASE:-}" ] || render dev dev # a release has no image for the variant `dev`
for component in manifests/components/*/; do
  component=$(basename "$component")
  # These components change only one rule of one policy, and can be combined with each of the others.
  case "$component" in dns-*) continue ;; esac
  render "production-$component" production "$component"
done
rm "$work/kustomization.yaml"
mkdir -p "$folder"
rm -f "$folder"/*.yaml # also remove the files of variants that no longer exist
mv "$work"/*.yaml "$folder"
