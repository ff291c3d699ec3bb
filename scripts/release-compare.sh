#!/bin/sh
# Fail unless the image in LAYOUT has the digest DIGEST.
# Usage: release-compare.sh
# The script reads DIGEST, LAYOUT and ORAS.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"

[ "$DIGEST" ] || fail "which digest is expected? DIGEST=sha256:..."
digest=$(image_digest)
[ "$digest" = "$DIGEST" ] \
|| fail "the image differs: $DIGEST was expected, and it is $digest. Nothing may be signed or published."
echo "$digest, as expected"
