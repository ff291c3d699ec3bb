#!/bin/sh
# Print the digest of DIST/release/SHA256SUMS, as sums=...: release-sums.sh
# Reads the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

sums=$(checksum)
echo "sums=$sums"
