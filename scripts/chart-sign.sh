#!/bin/sh
# Sign with cosign the chart that chart-publish.sh has published, in the name of the person or workflow that runs the script.
# Usage: chart-sign.sh
# The script reads the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

cosign sign --yes "$(cat "$DIST/chart")"
