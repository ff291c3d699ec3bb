# The scripts copy and read images with oras. Go builds oras once, from a module that is locked with its hashes.
# If ORAS is set, the scripts use the oras at this path instead.
ORAS=${ORAS:-$(go -C "${0%/*}/tools/oras" tool -n oras)} \
|| fail "oras cannot be built (see above): install Go, or name an oras: ORAS=..."

resolve() { # REPOSITORY: print the digest of this version there; print nothing if the repository does not have it
  # shellcheck disable=SC2154 # the script sets `work`, and lib/release.sh sets `version`
  "$ORAS" resolve "$1:$version" 2>"$work/log" || {
    # If the registry fails in any other way, stop: it may have the version already, and a version is never overwritten.
    grep -qF "$1:$version: not found" "$work/log" || {
      cat "$work/log" >&2
      fail "$1 does not say whether it has $version already (see above), so nothing is published;" \
        "if there is no such repository yet, make it first"
    }
  }
}

image_digest() { # check that the image in LAYOUT matches its digest, and print the digest
  [ -f "$LAYOUT/index.json" ] || fail "there is no image in $LAYOUT/; run: make image-multiarch"
  digest=$(layout_digest "$LAYOUT")
  "$ORAS" manifest fetch --oci-layout "$LAYOUT@$digest" >/dev/null || fail "$LAYOUT/ is broken; run: make image-multiarch"
  echo "$digest"
}
