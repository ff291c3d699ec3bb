#!/bin/sh
# Fail if the digest of the file DIST/release/SHA256SUMS is not SUMS, or if a file has another checksum than in SHA256SUMS.
# Usage: release-files-compare.sh
# The script reads SUMS, and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

[ "$SUMS" ] || fail "which checksums are expected? SUMS=..., from make release-sums"
sums=$(checksum)
[ "$sums" = "$SUMS" ] \
|| fail "the files differ: the digest $SUMS of their checksums was expected, and it is $sums. None may be uploaded."
work=$(mktemp -d)
remove_work_at_exit
(cd "$folder" && quietly sha256sum --check --strict SHA256SUMS) || exit
echo "$sums, as expected"
