#!/bin/sh
# Write the chart of a release, DIST/release/NAME-VERSION.tgz. Each run writes the same bytes.
# Usage: chart-package.sh
# The script reads HELM, RELEASE (SERVICE=NAME@DIGEST, for each service) and the variables of lib/release.sh. On GitHub it also
# reads the variable GITHUB_REPOSITORY, and replaces the example address of the repository.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/helm.sh"
. "${0%/*}/lib/release.sh"
. "${0%/*}/lib/replace.sh"

work=$(mktemp -d)
remove_work_at_exit
cp -R chart "$work/chart"
for image in $RELEASE; do
  case ${image%%=*} in
    */*) old="${image%%=*}[:@].*" ;; # an image by another project
    *) old="registry.example.com/${image%%=*}@sha256:0*" ;;
  esac
  replace "$old" "${image#*=}" "$work"/chart/manifests/*.yaml
done
# A package has no folder above it, so its links lead to the pages of this version.
replace '](\.\./' "](https://github.com/OWNER/hitcounter/blob/v$version/" "$work/chart/README.md"
replace OWNER/hitcounter "${GITHUB_REPOSITORY:-OWNER/hitcounter}" "$work"/chart/*.*
{
  echo "  artifacthub.io/images: |"
  sed -n 's/^ *-* *image: //p' "$work"/chart/manifests/*.yaml | sort -u | while read -r image; do
    name=${image##*/}
    echo "    - {name: \"${name%%[:@]*}\", image: \"$image\"}"
  done
  echo "  artifacthub.io/changes: |"
  changes | awk '/^- / { print "    - >-"; sub("- ", "") } { sub("^ *", ""); print "      " $0 }'
} >>"$work/chart/Chart.yaml"
# The archive has the files' times, and the registry's annotation has the archive's time.
find "$work/chart" -exec env TZ=UTC0 touch -t 198001010000 {} +
quietly "$HELM" package --destination "$folder" "$work/chart"
TZ=UTC0 touch -t 198001010000 "$(chart)"
