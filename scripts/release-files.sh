#!/bin/sh
# Write the release's files, except the images, into DIST/release, and the release's description into DIST/changes.md. If DIST has
# a bundle, it is one of these files.
# Usage: release-files.sh
# The script reads SERVICE, LAYOUT, ORAS, TAG, KUBECTL, and the variables of lib/release.sh. For each service, it also reads the
# file DIST/SERVICE.spdx.json, the list of contents. The manifests name the images in the first of REGISTRIES.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"
. "${0%/*}/lib/services.sh"

sh "${0%/*}/release-check.sh"
release=
for name in $(chosen); do
  digest=$(LAYOUT=${LAYOUT:-$name.oci} && image_digest)
  repositories=$(repositories "$name")
  release="$release $name=$(echo "$repositories" | head -n 1)@$digest"
done
others=$(find "$folder" -mindepth 1 -maxdepth 1 \
  ! -name '*.yaml' ! -name '*.spdx.json' ! -name '*.tgz' ! -name '*-airgap.tar' ! -name SHA256SUMS 2>/dev/null) || true
[ -z "$others" ] || fail "$folder has other files than those of a release: name another folder with DIST=..."
rm -rf "$folder" # otherwise SHA256SUMS would list files of an earlier run, and the release would have them
export RELEASE="$release"
sh "${0%/*}/manifests.sh" "$folder"
sh "${0%/*}/chart-package.sh"
for name in $(chosen); do cp "$DIST/$name.spdx.json" "$folder"; done
for file in "$DIST"/*-"$version-airgap.tar"; do [ ! -e "$file" ] || cp "$file" "$folder"; done # `make bundle` writes this file
changes >"$DIST/changes.md"
checksums >"$DIST/SHA256SUMS" || exit
mv "$DIST/SHA256SUMS" "$folder"
echo "$release" | xargs -n 1
