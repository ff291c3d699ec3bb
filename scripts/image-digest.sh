#!/bin/sh
# Build the image for each of PLATFORMS. Print the builder first, then a line with each platform and the digest of its image.
# Usage: image-digest.sh
# The script reads PLATFORMS, and the variables of lib/engine.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

choose_engine
work=$(mktemp -d)
remove_work_at_exit
describe_builder
for platform in $(echo "$PLATFORMS" | tr , ' '); do
  quietly layout . "$work/layout" "$platform"
  echo "$platform $(layout_digest "$work/layout")"
done
