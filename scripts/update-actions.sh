#!/bin/sh
# Give each action in the workflows the commit of its newest version, as Renovate would: update-actions.sh
# A tag does not say when it came out, so there is no week's wait as for packages: look at what is new before you commit it.
# minikube in ci.yml is left alone, and so are Go modules: go get -tool TOOL@latest in the folders of scripts/tools/, go get -u
# in bench/peers/go.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/replace.sh"

git grep -hoE 'uses: [^ .]+@[0-9a-f]{40}  # v[0-9.]+' .github/workflows | sort -u | while read -r _ action _ version; do
  name=${action%@*}
  # A tag may be an object of its own; the line after it, with ^{}, then has the commit.
  newest=$(git ls-remote --tags "https://github.com/$(echo "$name" | cut -d / -f 1,2)" 'v*' \
    | awk '{ sub("refs/tags/", "", $2); sub("\\^[{][}]", "", $2); if ($2 ~ /^v[0-9]+\.[0-9]+\.[0-9]+$/) commit[$2] = $1 }
           END { for (version in commit) print version, commit[version] }' | sort -V | tail -n 1)
  [ "$newest" ] || fail "$name has no versions"
  replace "$action  \# $version" "$name@${newest#* }  \# ${newest% *}" .github/workflows/*.yml
done
