#!/bin/sh
# Build the image for each of PLATFORMS; print the builder, then a line with the digest of each platform: image-digest.sh
# Reads PLATFORMS, and what lib/engine.sh reads.
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
