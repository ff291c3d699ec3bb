#!/bin/sh
# Fail if the digest of the file DIST/release/SHA256SUMS is not SUMS, or if the files beside it do not
# have exactly the checksums that it lists.
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
checksums >"$work/sums" || exit
diff "$folder/SHA256SUMS" "$work/sums" >&2 || fail "the files differ from their checksums (see above). None may be uploaded."
echo "$sums, as expected"
