#!/bin/sh
# Build twice with each engine, from copies that differ in all that must not matter, and compare the images: image-check.sh
# Reads PLATFORMS, and what lib/engine.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

copy() { # FOLDER TIME: put what a build gets into a new folder, with that time on every file
  mkdir -p "$1"
  for path in Containerfile .dockerignore $(sed -n 's/^!//p' .dockerignore); do
    mkdir -p "$1/$(dirname "$path")" && cp -R "$path" "$1/$path" || return
  done
  find "$1" -exec touch -t "$2" {} +
}

contents() { # FOLDER: print the digests of the unpacked layers, which do not depend on how the engine compresses
  grep -aoh '"diff_ids": *\[[^]]*\]' "$1"/blobs/sha256/*
}

choose_engine
work=$(mktemp -d)
remove_work_at_exit
(umask 022; copy "$work/one" 200102030405) || exit
(umask 077; copy "$work/another copy" 203012312359) || exit
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
      "(those of buildah 1.28 are known to; those of 1.33 and 1.43 equal BuildKit's): $layers and $contents"
    layers=$contents
  done
done
