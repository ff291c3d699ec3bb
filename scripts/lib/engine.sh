# This file has functions that build images with docker, podman or buildah. Each build of the same sources gives the same image.
# The functions read ENGINE, SERVICE, WHEELS and BUILD_OPTIONS.

unset SOURCE_DATE_EPOCH # if this variable is set, buildah refuses the option --timestamp

engines() { # print the engines that can be used: first docker, which has BuildKit; then podman or buildah
  if [ "${ENGINE:-}" ]; then
    command -v "$ENGINE" >/dev/null || fail "ENGINE=$ENGINE: there is no such command"
    echo "$ENGINE"
    return
  fi
  {
    # The command `docker` may be Podman, which may have a command `buildx`, too. Only Docker's buildx prints docker/buildx.
    if docker buildx version | grep -q docker/buildx && docker version; then echo docker >&3; fi
    if command -v podman; then echo podman >&3; elif command -v buildah; then echo buildah >&3; fi
  } 3>&1 >/dev/null 2>&1
}

choose_engine() { # set `engine` to the first engine that can be used
  engine=$(engines)
  engine=${engine%%
*}
  if [ -z "$engine" ]; then
    why_not_docker
    fail "an image needs an engine: start Docker (with buildx), or install podman or buildah, or name one: ENGINE=..."
  fi
}

why_not_docker() { # let docker say why it cannot be used, if it is installed
  if command -v docker >/dev/null; then { docker buildx version && docker version; } >/dev/null || true; fi
}

is_docker() { case "${engine##*/}" in docker*) ;; *) false ;; esac }

describe_builder() { # print the builder's kind and version; a digest depends only on these and on the inputs
  if is_docker; then
    description=$("$engine" buildx inspect --bootstrap) || fail "$engine does not describe its builder (see above)"
    version=$(echo "$description" | sed -n 's/^ *BuildKit version: *//p' | head -n 1)
    driver=$(echo "$description" | sed -n 's/^Driver: *//p')
    [ "$version" ] && [ "$driver" ] || fail "$engine buildx inspect does not print the builder's version and driver: $description"
    echo "BuildKit $version, driver $driver"
  else
    "$engine" --version
  fi
}

build() { # CONTEXT [OPTION...]: build the image from the folder CONTEXT, with more options of the engine
  context=$1
  shift
  { [ -e "$context/$SERVICE/__main__.py" ] && grep -qx "!$SERVICE" "$context/.dockerignore"; } \
  || fail "SERVICE=$SERVICE: there has to be a $SERVICE/__main__.py, and a line !$SERVICE in .dockerignore"
  # Make no attestation, because an attestation contains the time of the build. All other times in the image are fixed.
  if is_docker; then
    set -- buildx build --provenance=false --sbom=false --build-arg SOURCE_DATE_EPOCH=0 "$@"
  else
    set -- build --format=oci --layers --timestamp=0 "$@"
  fi
  if [ -d "$WHEELS" ]; then
    set -- "$@" --build-context="wheels=$(cd "$WHEELS" && pwd)" --network=none --build-arg PIP_NO_INDEX=1
  fi
  # shellcheck disable=SC2086 # each option is an argument
  if "$engine" "$@" --file="$context/Containerfile" --build-arg SERVICE="$SERVICE" ${BUILD_OPTIONS:-} "$context"; then return; fi
  [ ! -d "$WHEELS" ] || echo "make: built from $WHEELS/ alone; if requirements.txt has changed since then: make wheels" >&2
  return 1
}

layout() { # CONTEXT FOLDER PLATFORMS [OPTION...]: write an OCI layout, with an index if there are several platforms
  context=$1 folder=$2 targets=$3
  shift 3
  # A failed build may have left parts of a layout in the folder. Remove only such parts, never a file of somebody else.
  others=$(find "$folder" -mindepth 1 -maxdepth 1 \
    ! -name blobs ! -name index.json ! -name ingest ! -name oci-layout 2>/dev/null) || true
  [ -z "$others" ] || fail "$folder is not an OCI layout: name another folder with LAYOUT=..."
  rm -rf "$folder"
  if is_docker; then
    # Write an archive first. If BuildKit wrote into a folder, two platforms could write the same layer at a time and fail.
    # shellcheck disable=SC2154 # the script sets `work`
    build "$context" --platform="$targets" --output="type=oci,dest=$work/archive" "$@" \
    && mkdir -p "$folder" && tar -C "$folder" -xf "$work/archive"
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
      # shellcheck disable=SC2086 # each image is an argument
      "$engine" manifest create "$list" $ids >/dev/null || return
      "$engine" manifest push --quiet --all "$list" "oci:$folder:latest" || return
      "$engine" rmi "$list" >/dev/null
      ;;
    *) "$engine" push --quiet "${ids# }" "oci:$folder:latest" ;;
  esac
}
