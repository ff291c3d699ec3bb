#!/bin/sh
# Take what is newer, where it is named, as Renovate would, and show it: update.sh images | actions | changes
# An image keeps its tag. It leaves alone the development container, whose CLI is in .ci/devcontainer/package.json, minikube in ci.yml, and
# modules of Go: go get -tool TOOL@latest in the folders of .github/tools/, go get -u in bench/peers/go.
# Neither an image nor an action tells when it came out, so there is no week's wait as for packages: look at what is new before you commit it.
set -eu

fail() { echo "make: $*" >&2; exit 1; }

replace() { # OLD NEW FILE...: in each file
  old=$1 new=$2
  shift 2
  sed -i.old "s#$old#$new#g" "$@"
  for file in "$@"; do rm "$file.old"; done
}

images() { # each NAME:TAG@DIGEST gets the digest that the tag has now
  oras=${ORAS:-$(go -C .github/tools/oras tool -n oras)} || fail "oras is needed: install Go, which builds it, or name one: ORAS=..."
  git grep -hoE '[a-z0-9][a-z0-9.:-]*(/[a-z0-9._-]+)+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' | sort -u | while read -r image; do
    digest=$("$oras" resolve "${image%@*}") || fail "${image%@*} is not to be had"
    # shellcheck disable=SC2046 # several files
    [ "${image#*@}" = "$digest" ] || replace "$image" "${image%@*}@$digest" $(git grep -lF "$image")
  done
}

actions() { # each action gets the commit of its newest version
  git grep -hoE 'uses: [^ .]+@[0-9a-f]{40}  # v[0-9.]+' .github/workflows | sort -u | while read -r _ action _ version; do
    name=${action%@*}
    # A tag may be an object of its own; the line after it, with ^{}, then has the commit.
    newest=$(git ls-remote --tags "https://github.com/$(echo "$name" | cut -d / -f 1,2)" 'v*' \
      | awk '{ sub("refs/tags/", "", $2); sub("\\^[{][}]", "", $2); if ($2 ~ /^v[0-9]+\.[0-9]+\.[0-9]+$/) commit[$2] = $1 }
             END { for (version in commit) print version, commit[version] }' | sort --version-sort | tail -n 1)
    [ "$newest" ] || fail "$name has no versions"
    replace "$action  \# $version" "$name@${newest#* }  \# ${newest% *}" .github/workflows/*.yml
  done
}

changes() { # show which pins the working copy has changed
  shown=$(git --no-pager diff --no-ext-diff --no-color --unified=0 | grep -E '^(\+\+\+ |[-+].*([a-z0-9]==[0-9]|@sha256:|@[0-9a-f]{40}))' \
    | awk '/^\+\+\+ / { file = $0 "\n"; next } { print file $0; file = "" }')
  echo "${shown:-nothing is newer}"
}

"$1"
