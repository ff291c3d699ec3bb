#!/bin/sh
# Write the image for all PLATFORMS into the folder LAYOUT, as an OCI layout.
# Usage: image-multiarch.sh
# The script reads LAYOUT, PLATFORMS, and the variables of lib/engine.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

choose_engine
work=$(mktemp -d)
remove_work_at_exit
layout . "$LAYOUT" "$PLATFORMS"
