#!/bin/sh
# Print the digest of the image in LAYOUT, as digest=sha256:...
# Usage: release-digest.sh
# The script reads LAYOUT and ORAS.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"

digest=$(image_digest)
echo "digest=$digest"
