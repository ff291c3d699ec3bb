#!/bin/sh
# Sign the image in LAYOUT in each of REPOSITORIES with cosign, as the person or the workflow that runs this: sign.sh
# Reads LAYOUT, ORAS, and what lib/release.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

repositories=$(repositories)
digest=$(image_digest)
for repository in $repositories; do
  cosign sign --yes "$repository@$digest"
done
