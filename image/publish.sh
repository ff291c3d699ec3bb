#!/bin/sh
# Take the image of an OCI layout to registries, and say what it is. Used by the Makefile's targets of a release:
#   publish.sh commit | digest | compare DIGEST | check [TAG] | files FOLDER | sums FOLDER | compare-files FOLDER SUMS | push FOLDER | sign
# LAYOUT, SERVICE, VERSION, REPOSITORIES, ORAS, KUBECTL are the Makefile's variables.
set -eu
CDPATH='' cd "$(dirname "$0")/.."

fail() { echo "make: $*" >&2; exit 1; }

quietly() { # COMMAND...: show what it says only if it fails
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}

oras() {
  # Built once, from a Go module that is locked with its hashes.
  [ "$ORAS" ] || ORAS=$(go -C .github/tools/oras tool -n oras) || fail "oras is needed: install Go, which builds it, or name one: ORAS=..."
  "$ORAS" "$@"
}

commit() { # print the commit that the sources are of, after a look at whether they are
  # Also what git was told to overlook, but for what no build gets.
  # shellcheck disable=SC2046 # several files
  set -- Containerfile $(sed -n 's/^!//p' .dockerignore)
  changed=$(git status --porcelain --no-renames --untracked-files=all --ignored -- "$@") || fail "the sources are in no repository of git"
  changed=$(echo "$changed" | grep -v -e /__pycache__/ -e '/\.' -e '~"*$') || true
  changed=$changed$(git ls-files -v -- "$@" | grep '^[a-zS]') || true
  [ -z "$changed" ] || fail "the sources are of no commit, so no provenance can name one; commit first: $changed"
  git rev-parse HEAD
}

digest() { # print the digest of what is in the layout, after a look at whether it is that
  [ -f "$LAYOUT/index.json" ] || fail "there is no image in $LAYOUT/; run: make image-multiarch"
  digest=$(sed -n 's/.*"digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "$LAYOUT/index.json")
  oras manifest fetch --oci-layout "$LAYOUT@$digest" >/dev/null || fail "$LAYOUT/ is broken; run: make image-multiarch"
  echo "$digest"
}

compare() { # DIGEST: fail unless the layout has it
  [ "$1" ] || fail "compare with what? DIGEST=sha256:..."
  here=$(digest)
  [ "$here" = "$1" ] || fail "the image differs: it was to be $1 and is $here. Nothing may be signed or published."
  echo "$here, as it was to be"
}

changes() { # print the section of this version in the changelog
  awk -v version="$VERSION" '/^## / { wanted = ($2 == version); next } wanted' CHANGELOG.md | sed '/./,$!d'
}

check() { # [TAG]: fail unless the tag, the version and the changelog are of one release
  [ -z "$1" ] || [ "$1" = "v$VERSION" ] || fail "the tag is $1, and $SERVICE/__init__.py has the version $VERSION: it has to be v$VERSION"
  [ "$(changes)" ] || fail "CHANGELOG.md has nothing on $VERSION: write what changed, as its users see it, under ## $VERSION"
}

each() { # COMMAND...: run it for each repository, as the last argument
  [ "$REPOSITORIES" ] || fail "where to? REPOSITORIES=\"ghcr.io/NAME/$SERVICE docker.io/NAME/$SERVICE\""
  for repository in $(echo "$REPOSITORIES" | tr '[:upper:]' '[:lower:]'); do "$@" "$repository"; done
}

files() { # FOLDER: write what a release has besides the image
  check ""
  names=$(each echo)
  digest=$(digest)
  image=$(echo "$names" | head -n 1)@$digest
  rm -rf "$1" # what is left of another time would be hashed, and uploaded
  RELEASE=$image KUBECTL=$KUBECTL manifests/render.sh "$1"
  for file in sbom.spdx.json provenance.json; do cp "$1/../$file" "$1"; done
  changes >"$1/../changes.md"
  (cd "$1" && sha256sum -- * >../SHA256SUMS && mv ../SHA256SUMS .) || exit
  echo "$image"
}

sums() { # FOLDER: print the digest of the checksums of a release's files, and so of all of them
  [ -f "$1/SHA256SUMS" ] || fail "there are no files of a release in $1/; run: make release-files"
  sha256sum "$1/SHA256SUMS" | cut -d ' ' -f 1
}

compare_files() { # FOLDER SUMS: fail unless its checksums are these, and of what is in it
  [ "$2" ] || fail "compare with what? SUMS=..., from make release-sums"
  here=$(sums "$1")
  [ "$here" = "$2" ] || fail "the files differ: their checksums were to be $2 and are $here. None may be uploaded."
  (cd "$1" && quietly sha256sum --check --strict SHA256SUMS) || exit
  echo "$here, as it was to be"
}

push() { # FOLDER REPOSITORY: publish the version there, with what is known of it, and read it all back
  folder=$1 repository=$2
  digest=$(digest)
  if ! there=$(oras resolve "$repository:$VERSION" 2>"$work/log"); then
    # Any other failure may hide a version that this would overwrite.
    grep -qF "$repository:$VERSION: not found" "$work/log" || {
      cat "$work/log" >&2
      fail "$repository does not say whether it has $VERSION already (see above), so nothing is published; if there is no such repository yet, make it first"
    }
    there=$digest
  fi
  [ "$there" = "$digest" ] || fail "$repository:$VERSION is $there already, and not $digest: a version never changes; publish another"
  quietly oras copy --no-tty --from-oci-layout "$LAYOUT@$digest" "$repository:$VERSION"
  there=$(oras resolve "$repository:$VERSION")
  [ "$there" = "$digest" ] || fail "$repository:$VERSION is $there, and not $digest"
  attach "$repository@$digest" "$folder" sbom.spdx.json application/spdx+json
  attach "$repository@$digest" "$folder" provenance.json application/vnd.in-toto+json
  echo "$repository@$digest"
}

attach() { # IMAGE FOLDER FILE TYPE: let the file refer to the image, once, and read it back
  # Without a time, so that it is the same thing when it is done again.
  (cd "$2" && quietly oras attach --no-tty --artifact-type "$4" --annotation org.opencontainers.image.created=1970-01-01T00:00:00Z "$1" "$3:$4") || exit
  referrer=$(oras discover --artifact-type "$4" --format go-template='{{range .referrers}}{{.digest}}{{"\n"}}{{end}}' "$1" | head -n 1)
  quietly oras pull --no-tty --output "$work" "${1%@*}@$referrer"
  cmp "$work/$3" "$2/$3" || fail "$1 has another $3 already: it was published by somebody else, or from other sources"
}

sign() { # REPOSITORY
  digest=$(digest)
  cosign sign --yes "$1@$digest"
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
command=$1
shift
case "$command" in
  commit) commit ;;
  digest)
    digest=$(digest)
    echo "digest=$digest"
    ;;
  compare) compare "$1" ;;
  check) check "${1:-}" ;;
  files) files "$1" ;;
  sums)
    sums=$(sums "$1")
    echo "sums=$sums"
    ;;
  compare-files) compare_files "$1" "$2" ;;
  push) each push "$1" ;;
  sign) each sign ;;
esac
