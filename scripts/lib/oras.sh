# How images are copied and read: by oras, which is built once from a Go module that is locked with its hashes.
# Reads ORAS, an oras that is there already.
ORAS=${ORAS:-$(go -C "${0%/*}/tools/oras" tool -n oras)} \
|| fail "oras is needed: install Go, which builds it, or name one: ORAS=..."

image_digest() { # print the digest of the image in LAYOUT, once it is certain that it is that image's
  [ -f "$LAYOUT/index.json" ] || fail "there is no image in $LAYOUT/; run: make image-multiarch"
  digest=$(layout_digest "$LAYOUT")
  "$ORAS" manifest fetch --oci-layout "$LAYOUT@$digest" >/dev/null || fail "$LAYOUT/ is broken; run: make image-multiarch"
  echo "$digest"
}
