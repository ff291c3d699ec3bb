# The scripts copy and read images with oras. Go builds oras once, from a module that is locked with its hashes.
# If ORAS is set, the scripts use the oras at this path instead.
ORAS=${ORAS:-$(go -C "${0%/*}/tools/oras" tool -n oras)} \
|| fail "oras cannot be built (see above): install Go, or name an oras: ORAS=..."

image_digest() { # check that the image in LAYOUT matches its digest, and print the digest
  [ -f "$LAYOUT/index.json" ] || fail "there is no image in $LAYOUT/; run: make image-multiarch"
  digest=$(layout_digest "$LAYOUT")
  "$ORAS" manifest fetch --oci-layout "$LAYOUT@$digest" >/dev/null || fail "$LAYOUT/ is broken; run: make image-multiarch"
  echo "$digest"
}
