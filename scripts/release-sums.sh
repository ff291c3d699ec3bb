#!/bin/sh
# Print the digest of the file DIST/release/SHA256SUMS, as sums=...
# Usage: release-sums.sh
# The script reads the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

sums=$(checksum)
echo "sums=$sums"
