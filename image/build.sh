#!/bin/sh
# Make images, with any of three engines, the same each time. Used by the Makefile's image targets:
#   build.sh engines | builder | load NAME | layout FOLDER | digests | check
# ENGINE, SERVICE, PLATFORMS, BUILD_OPTIONS, WHEELS are the Makefile's variables.
set -eu
unset SOURCE_DATE_EPOCH # buildah would take it, and refuse --timestamp beside it

fail() { echo "make: $*" >&2; exit 1; }

engines() { # print each engine that can be used: BuildKit first, then one that builds with buildah
  if [ "${ENGINE:-}" ]; then
    command -v "$ENGINE" >/dev/null || fail "ENGINE=$ENGINE: there is no such command"
    echo "$ENGINE"
    return
  fi
  {
    # Podman too may have the name `docker`, and a command `buildx`.
    if docker buildx version | grep -q docker/buildx && docker version; then echo docker >&3; fi
    if command -v podman; then echo podman >&3; elif command -v buildah; then echo buildah >&3; fi
  } 3>&1 >/dev/null 2>&1
}

first() {
  engine=$(engines)
  engine=${engine%%
*}
  [ "$engine" ] || fail "an image needs an engine: start Docker (with buildx), or install podman or buildah, or name one: ENGINE=..."
}

is_docker() { case "${engine##*/}" in docker*) ;; *) false ;; esac }

build() { # CONTEXT [OPTION...]: run the engine's build
  context=$1
  shift
  { [ -e "$context/$SERVICE/__main__.py" ] && grep -qx "!$SERVICE" "$context/.dockerignore"; } \
  || fail "SERVICE=$SERVICE: there has to be a $SERVICE/__main__.py, and a line !$SERVICE in .dockerignore"
  # No attestation: one has the time of the build in it. No other time either.
  if is_docker; then
    set -- buildx build --provenance=false --sbom=false --build-arg SOURCE_DATE_EPOCH=0 "$@"
  else
    set -- build --format=oci --layers --timestamp=0 "$@"
  fi
  if [ -d "$WHEELS" ]; then
    set -- "$@" --build-context="wheels=$WHEELS" --network=none --build-arg PIP_NO_INDEX=1
  fi
  # shellcheck disable=SC2086 # several options
  if "$engine" "$@" --file="$context/Containerfile" --build-arg SERVICE="$SERVICE" ${BUILD_OPTIONS:-} "$context"; then return; fi
  [ ! -d "$WHEELS" ] || echo "make: built from $WHEELS/ alone; if requirements.txt has changed since then: make wheels" >&2
  return 1
}

layout() { # CONTEXT FOLDER PLATFORMS [OPTION...]: write an OCI layout, of an index if there are several platforms
  context=$1 folder=$2 targets=$3
  shift 3
  # A build that failed leaves a part of a layout.
  others=$(find "$folder" -mindepth 1 -maxdepth 1 ! -name blobs ! -name index.json ! -name ingest ! -name oci-layout 2>/dev/null) || true
  [ -z "$others" ] || fail "$folder is no OCI layout: name another folder with LAYOUT=..."
  rm -rf "$folder"
  if is_docker; then
    # By way of an archive: into a folder, two platforms that share a layer may both write it, and one then fails.
    build "$context" --platform="$targets" --output="type=oci,dest=$work/archive" "$@" && mkdir -p "$folder" && tar -C "$folder" -xf "$work/archive"
    return
  fi
  ids=
  for platform in $(echo "$targets" | tr , ' '); do
    build "$context" --platform="$platform" --iidfile="$work/id" "$@" || return
    ids="$ids $(cat "$work/id")"
  done
  case "$targets" in
    *,*)
      list=localhost/image-$$
      # shellcheck disable=SC2086 # several images
      "$engine" manifest create "$list" $ids >/dev/null && "$engine" manifest push --quiet --all "$list" "oci:$folder:latest" || return
      "$engine" rmi "$list" >/dev/null
      ;;
    *) "$engine" push --quiet "${ids# }" "oci:$folder:latest" ;;
  esac
}

logged() { # COMMAND...: run it, and show what it says only if it fails
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}

digest() { # FOLDER: print the digest of the manifest in an OCI layout of one platform
  sed -n 's/.*"digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "$1/index.json"
}

contents() { # FOLDER: print the digests of the layers as they are when unpacked
  grep -aoh '"diff_ids": *\[[^]]*\]' "$1"/blobs/sha256/*
}

builder() { # print what, besides the inputs, a digest depends on
  if is_docker; then
    echo "BuildKit $("$engine" buildx inspect --bootstrap | sed -n 's/^ *BuildKit version: *//p' | head -n 1), driver $("$engine" buildx inspect | sed -n 's/^Driver: *//p')"
  else
    "$engine" --version
  fi
}

digests() {
  first
  builder
  for platform in $(echo "$PLATFORMS" | tr , ' '); do
    logged layout . "$work/layout" "$platform"
    echo "$platform $(digest "$work/layout")"
  done
}

copy() { # FOLDER TIME: put what a build gets into a new folder
  mkdir -p "$1"
  for path in Containerfile .dockerignore $(sed -n 's/^!//p' .dockerignore); do
    mkdir -p "$1/$(dirname "$path")" || return
    cp -R "$path" "$1/$path" || return
  done
  find "$1" -exec touch -t "$2" {} +
}

check() { # build twice with each engine, under all that should not matter, and compare
  first
  (umask 022; copy "$work/one" 200102030405) || exit
  (umask 077; copy "$work/another copy" 203012312359) || exit
  for platform in $(echo "$PLATFORMS" | tr , ' '); do
    layers=
    for engine in $(engines); do
      for context in "$work/one" "$work/another copy"; do
        logged layout "$context" "$context.layout" "$platform" --no-cache
      done
      one=$(digest "$work/one.layout") another=$(digest "$work/another copy.layout")
      echo "$platform $one ($(builder))"
      [ "$one" = "$another" ] || fail "a second build for $platform, of a copy, gives another image: $another"
      contents=$(contents "$work/one.layout")
      [ "${layers:-$contents}" = "$contents" ] || fail "the layers differ between two engines (those of buildah 1.28 are known to, those of 1.33 and 1.43 are equal to BuildKit's): $layers and $contents"
      layers=$contents
    done
  done
}

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
case "$1" in
  engines)
    first
    engines
    ;;
  load)
    first
    # Docker's own kind of manifest, which --load writes, would have another digest.
    if is_docker; then build . --output="type=docker,name=$2,oci-mediatypes=true"; else build . --tag "$2"; fi
    ;;
  layout)
    first
    layout . "$2" "$PLATFORMS"
    ;;
  digests) digests ;;
  check) check ;;
  builder)
    first
    builder
    ;;
esac
