#!/bin/sh
# Fail unless the image in LAYOUT has the digest that DIGESTS has for SERVICE. Print this digest, as digest=sha256:...
# Usage: release-compare.sh
# The script reads DIGESTS (the output of release-digest.sh without `digests=`), SERVICE, LAYOUT and ORAS.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"

expected=$(echo "$DIGESTS" | sed -n "s/.*\"$SERVICE\":\"\(sha256:[0-9a-f]*\)\".*/\1/p")
[ "$expected" ] || fail "which digest is expected for $SERVICE? DIGESTS='{\"$SERVICE\":\"sha256:...\"}', from make release-digest"
digest=$(image_digest)
[ "$digest" = "$expected" ] \
|| fail "the image of $SERVICE differs: $expected was expected, and its digest is $digest. Nothing may be signed or published."
echo "digest=$digest"
