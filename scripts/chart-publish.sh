#!/bin/sh
# Publish the release's chart in the first of REGISTRIES, as REGISTRY/charts/hitcounter:VERSION, and read it back. Do not push a
# chart that the registry already has. Write the chart's name and digest into DIST/chart, for chart-sign.sh.
# Usage: chart-publish.sh
# The script reads HELM, ORAS and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/helm.sh"
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

file=$(chart)
name=${file##*/}
name=${name%-"$version".tgz}
# Docker Hub has no folders, so only the first registry gets the chart.
charts=$(repositories charts | head -n 1)
case $charts in localhost[:/]*) http=--plain-http ;; *) http= ;; esac
work=$(mktemp -d)
remove_work_at_exit
published=$(resolve "$charts/$name")
[ "$published" ] || quietly "$HELM" push $http "$file" "oci://$charts"
published=$(resolve "$charts/$name")
quietly "$HELM" pull $http --destination "$work" "oci://$charts/$name@$published"
cmp "$work"/*.tgz "$file" \
|| fail "$charts/$name:$version is another chart already: a version never changes, so publish a new version"
echo "$charts/$name@$published" | tee "$DIST/chart"
