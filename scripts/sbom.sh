#!/bin/sh
# Write DIST/SERVICE.spdx.json, the list of the contents of the image in LAYOUT. Each run writes the same bytes.
# Usage: sbom.sh
# The script reads VENV, LAYOUT, WHEELS, and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

mkdir -p "$DIST"
"$VENV/bin/python" "${0%/*}/sbom.py" "$LAYOUT" requirements.txt "$WHEELS" "$version" >"$DIST/sbom.new"
mv "$DIST/sbom.new" "$DIST/$SERVICE.spdx.json"
