#!/bin/sh
# Write DIST/release, the files that a release has besides the image, and DIST/changes.md, its description: release-files.sh
# Reads LAYOUT, ORAS, TAG, KUBECTL, and the variables of lib/release.sh. Also reads DIST/sbom.spdx.json, the list of contents.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"

sh "${0%/*}/release-check.sh"
repositories=$(repositories)
digest=$(image_digest)
image=$(echo "$repositories" | head -n 1)@$digest
rm -rf "$folder" # otherwise files of an earlier run would be hashed and uploaded, too
RELEASE=$image sh "${0%/*}/manifests.sh" "$folder"
cp "$DIST/sbom.spdx.json" "$folder"
changes >"$DIST/changes.md"
(cd "$folder" && sha256sum -- * >../SHA256SUMS && mv ../SHA256SUMS .) || exit
echo "$image"
