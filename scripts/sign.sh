#!/bin/sh
# Sign the image in LAYOUT in each of REPOSITORIES with cosign, as the person or workflow that runs the script: sign.sh
# Reads LAYOUT, ORAS, and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

repositories=$(repositories)
digest=$(image_digest)
for repository in $repositories; do
  cosign sign --yes "$repository@$digest"
done
