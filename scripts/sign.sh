#!/bin/sh
# Sign the image of SERVICE in each of REGISTRIES with cosign, in the name of the person or workflow that runs the script. The
# digest of the image comes from LAYOUT.
# Usage: sign.sh
# The script reads LAYOUT, ORAS, and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

repositories=$(repositories "$SERVICE")
digest=$(image_digest)
for repository in $repositories; do
  cosign sign --yes "$repository@$digest"
done
