#!/bin/sh
# Build the image of the package SERVICE, and load it into the engine under the name IMAGE.
# Usage: image.sh
# The script reads IMAGE, and the variables of lib/engine.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

choose_engine
if is_docker; then
  # Use no --load: this option writes a manifest in Docker's own format, whose digest differs from that of the OCI manifest.
  build . --output="type=docker,name=$IMAGE,oci-mediatypes=true"
else
  build . --tag "$IMAGE"
fi
