#!/bin/sh
# For each action in the workflows, write the commit of its newest version, as Renovate does.
# Usage: update-actions.sh
# A tag does not record when it was published, so this script cannot wait a week, as update-packages.sh does. Check what is new
# before you commit.
# The script does not update minikube in ci.yml. It does not update Go modules either: run `go get -tool TOOL@latest` in the
# folders of scripts/tools/ (docs/development.md explains more about Skaffold's), and `go get -u` in bench/peers/go.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/replace.sh"

find_pins -hoE 'uses: [^ .]+@[0-9a-f]{40}  # v[0-9.]+' .github/workflows | sort -u | while read -r _ action _ version; do
  name=${action%@*}
  # git prints two lines for an annotated tag: the first has the tag's own hash, the second (NAME^{}) has the commit. So awk keeps
  # the later line of each version.
  newest=$(git ls-remote --tags "https://github.com/$(echo "$name" | cut -d / -f 1,2)" 'v*' \
    | awk '{ sub("refs/tags/", "", $2); sub("\\^[{][}]", "", $2); if ($2 ~ /^v[0-9]+\.[0-9]+\.[0-9]+$/) commit[$2] = $1 }
           END { for (version in commit) print version, commit[version] }' | sort -V | tail -n 1)
  [ "$newest" ] || fail "no version of $name can be read (see above)"
  replace "$action  \# $version" "$name@${newest#* }  \# ${newest% *}" .github/workflows/*.yml
done
