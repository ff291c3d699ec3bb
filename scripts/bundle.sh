#!/bin/sh
# Write DIST/NAME-VERSION-airgap.tar, one file with everything that a cluster without internet needs: the images of all services
# and of Valkey, manifests, chart, sources, wheels, lists of contents, and install.sh. Each run writes the same bytes.
# With BASES=1, write DIST/NAME-VERSION-airgap-bases.tar instead: the images that a build of the services' images needs.
# Usage: bundle.sh
# The script reads ORAS, KUBECTL, HELM, PLATFORMS, WHEELS, VENV, VALKEY, BUILDKIT, and the variables of lib/release.sh.
# It reads each service's image from SERVICE.oci/, and each service's list of contents from DIST/. The images' names begin with
# the first of REGISTRIES; the default is registry.example.com. If SIGNING_KEY names a private key of OpenSSH, the script signs
# the file. If MIRROR is set, the script reads the images of other projects from this registry, such as MIRROR/valkey/valkey.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/release.sh"
. "${0%/*}/lib/services.sh"

add() { # FOLDER NAME LAYOUT DIGEST: copy an image into the OCI layout FOLDER, and print its digest
  "$VENV/bin/python" scripts/bundle.py image "$1" "$2" "$3" "$4" "$PLATFORMS"
}

pull() { # FOLDER NAME SOURCE: copy the image SOURCE from a registry into the OCI layout FOLDER as NAME, and print its digest
  source=$3
  if [ "${MIRROR:-}" ]; then source=$MIRROR/${3#*/}; fi
  rm -rf "$work/pulled"
  mkdir -p "$work/pulled/blobs/sha256"
  digest=$("$ORAS" resolve "$source") || fail "$source cannot be read (see above)"
  source=${source%@*}@$digest
  file=$work/pulled/blobs/sha256/${digest#sha256:}
  "$ORAS" manifest fetch --output "$work/root" "$source" >/dev/null || fail "$source cannot be read (see above)"
  if grep -q '"manifests"' "$work/root"; then
    # The index may have more platforms. The bundle leaves them out.
    for platform in $(echo "$PLATFORMS" | tr , ' '); do
      quietly "$ORAS" copy --no-tty --platform="$platform" --to-oci-layout "$source" "$work/pulled:${platform##*/}"
    done
  else
    quietly "$ORAS" copy --no-tty --to-oci-layout "$source" "$work/pulled:it"
  fi
  cp "$work/root" "$file"
  add "$1" "$2" "$work/pulled" "$digest"
}

default() { sed -n "s/^ARG $1=//p" Containerfile; } # ARG: print the default of an argument of the Containerfile

name=$(sed -n 's/^name: //p' chart/Chart.yaml)-$version-airgap
# The folder is in DIST, because `mv` replaces a file atomically only within one file system.
mkdir -p "$DIST"
work=$(mktemp -d "$DIST/.bundle.XXXXXX")
remove_work_at_exit
root=$work/$name
if [ "${BASES:-}" ]; then
  file=$DIST/$name-bases.tar top=$name/bases
  mkdir -p "$root"
  for image in "${PYTHON_IMAGE:-$(default PYTHON)}" "${BASE_IMAGE:-$(default BASE)}" "$BUILDKIT"; do
    [ "$image" ] || continue
    digest=$(pull "$root" "${image%@*}" "$image")
    echo "${image%@*}@$digest"
  done
else
  file=$DIST/$name.tar top=$name
  git -c core.quotePath=false ls-files >"$work/sources" || true
  grep -qx Containerfile "$work/sources" \
  || fail "the bundle has the sources that git knows, and git knows none here (see above): git init && git add --all"
  mkdir -p "$root/manifests" "$root/images" "$work/release"
  services=$(services)
  [ "$(chosen)" = "$services" ] || fail "a bundle has the images of all services: leave SERVICE and LAYOUT out"
  REGISTRIES=${REGISTRIES:-registry.example.com}
  RELEASE=
  for SERVICE in $services; do
    layout=${LAYOUT:-$SERVICE.oci}
    repository=$(repositories "$SERVICE" | head -n 1)
    digest=$(LAYOUT=$layout && image_digest)
    RELEASE="$RELEASE $SERVICE=$repository@$(add "$root/images" "$repository:$version" "$layout" "$digest")"
    cp "$DIST/$SERVICE.spdx.json" "$root"
  done
  valkey=$(sed -n 's/^ *image: //p' manifests/redis/statefulset.yaml)
  digest=$(pull "$root/images" "${valkey%@*}" "${VALKEY:-$valkey}")
  tagged=${valkey%@*}
  RELEASE="$RELEASE ${tagged%:*}=${tagged%:*}@$digest"
  export RELEASE
  echo "$RELEASE" | xargs -n 1 | tee "$root/images.txt"
  sh "${0%/*}/manifests.sh" "$root/manifests"
  DIST=$work sh "${0%/*}/chart-package.sh"
  cp "$work"/release/*.tgz "$root"
  mkdir "$root/wheels"
  for wheel in "$WHEELS"/*.whl; do
    hash=$(sha256 "$wheel" | cut -c 1-64)
    # WHEELS may also have wheels of an older lock.
    ! grep -qF "sha256:$hash" requirements.txt requirements-dev.txt || cp "$wheel" "$root/wheels"
  done
  while read -r path; do
    [ ! -f "$path" ] || { mkdir -p "$root/source/$(dirname "$path")" && cp "$path" "$root/source/$path"; }
  done <"$work/sources"
  cp scripts/bundle/install.sh scripts/bundle/push.py "$root"
fi
"$VENV/bin/python" scripts/bundle.py archive "$root" "$top" "$work/bundle.tar"
rm -f "$file.sig"
mv "$work/bundle.tar" "$file"
if [ "${SIGNING_KEY:-}" ]; then
  # An Ed25519 signature of the same file has the same bytes each time.
  quietly ssh-keygen -Y sign -f "$SIGNING_KEY" -n file "$file"
fi
sha256 "$file"
