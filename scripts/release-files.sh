#!/bin/sh
# Write the release's files, except the image, into DIST/release, and the release's description into DIST/changes.md.
# Usage: release-files.sh
# The script reads LAYOUT, ORAS, TAG, KUBECTL, and the variables of lib/release.sh. It also reads the file DIST/sbom.spdx.json,
# the list of contents.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

sh "${0%/*}/release-check.sh"
repositories=$(repositories)
digest=$(image_digest)
image=$(echo "$repositories" | head -n 1)@$digest
rm -rf "$folder" # otherwise SHA256SUMS would list files of an earlier run, and the release would have them
RELEASE=$image sh "${0%/*}/manifests.sh" "$folder"
cp "$DIST/sbom.spdx.json" "$folder"
changes >"$DIST/changes.md"
(cd "$folder" && sha256sum -- * >../SHA256SUMS && mv ../SHA256SUMS .) || exit
echo "$image"
