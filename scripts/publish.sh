#!/bin/sh
# Publish the image of SERVICE, which is in LAYOUT, in each of REGISTRIES, with its version as the tag. An image that is published
# already is not pushed again. Attach the list of contents to the image, and read both back.
# Usage: publish.sh
# The script reads LAYOUT, ORAS, and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

attach() { # IMAGE FILE TYPE: attach FILE to IMAGE as a referrer of the media type TYPE, and read FILE back
  # Fix the creation time, so that attaching the same file again gives a referrer with the same digest.
  (cd "$folder" && quietly "$ORAS" attach --no-tty --artifact-type "$3" \
    --annotation org.opencontainers.image.created=1970-01-01T00:00:00Z "$1" "$2:$3") || exit
  digests='{{range .referrers}}{{.digest}}{{"\n"}}{{end}}'
  referrer=$("$ORAS" discover --artifact-type "$3" --format go-template="$digests" "$1" | head -n 1)
  quietly "$ORAS" pull --no-tty --output "$work" "${1%@*}@$referrer"
  cmp "$work/$2" "$folder/$2" || fail "$1 has another $2 already: it was published by somebody else, or from other sources"
}

repositories=$(repositories "$SERVICE")
digest=$(image_digest)
work=$(mktemp -d)
remove_work_at_exit
for repository in $repositories; do
  published=$(resolve "$repository")
  [ "${published:-$digest}" = "$digest" ] \
  || fail "$repository:$version is $published already, and not $digest: a version never changes; publish another"
  [ "$published" ] || quietly "$ORAS" copy --no-tty --from-oci-layout "$LAYOUT@$digest" "$repository:$version"
  published=$(resolve "$repository")
  [ "$published" = "$digest" ] || fail "$repository:$version is $published, and not $digest"
  attach "$repository@$digest" "$SERVICE.spdx.json" application/spdx+json
  echo "$repository@$digest"
done
