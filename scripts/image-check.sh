#!/bin/sh
# Build the image twice with each engine and compare the digests. The two copies of the sources differ in path, file times and
# permissions, which must not change the image.
# Usage: image-check.sh
# The script reads PLATFORMS, and the variables of lib/engine.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

copy() { # FOLDER TIME: copy the inputs of a build into the new folder FOLDER, and set the time of every file to TIME
  mkdir -p "$1"
  for path in Containerfile .dockerignore $(sed -n 's/^!//p' .dockerignore); do
    mkdir -p "$1/$(dirname "$path")" && cp -R "$path" "$1/$path" || return
  done
  find "$1" -exec env TZ=UTC touch -t "$2" {} +
}

contents() { # FOLDER: print the digests of the unpacked layers; unlike the image's digest, they do not depend on compression
  grep -aoh '"diff_ids": *\[[^]]*\]' "$1"/blobs/sha256/*
}

choose_engine
work=$(mktemp -d)
remove_work_at_exit
# BuildKit keeps the files of earlier builds, and takes a file with the same path, size and time for unchanged. Seconds that no
# earlier check can have used make it read every file. Both years have a 29 February.
now=$(date -u +%m%d%H%M.%S)
(umask 022; copy "$work/one" "2004$now") || exit
(umask 077; copy "$work/another copy" "2036$now") || exit
for platform in $(echo "$PLATFORMS" | tr , ' '); do
  layers=
  for engine in $(engines); do
    for context in "$work/one" "$work/another copy"; do
      quietly layout "$context" "$context.layout" "$platform" --no-cache
    done
    one=$(layout_digest "$work/one.layout") another=$(layout_digest "$work/another copy.layout")
    builder=$(describe_builder)
    echo "$platform $one ($builder)"
    [ "$one" = "$another" ] || fail "a second build for $platform, of a copy, gives another image: $another"
    contents=$(contents "$work/one.layout")
    [ "${layers:-$contents}" = "$contents" ] || fail "the layers differ between two engines" \
      "(layers of buildah 1.28 are known to differ; layers of 1.33 and 1.43 equal BuildKit's): $layers and $contents"
    layers=$contents
  done
done
