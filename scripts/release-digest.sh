#!/bin/sh
# Print the digests of the images of all services, as digests={"SERVICE":"sha256:...",...}
# Usage: release-digest.sh
# The script reads SERVICE, LAYOUT and ORAS. If LAYOUT is empty, the image of each service is in SERVICE.oci.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/services.sh"

digests=
for name in $(chosen); do
  digest=$(LAYOUT=${LAYOUT:-$name.oci} && image_digest)
  digests="$digests,\"$name\":\"$digest\""
done
echo "digests={${digests#,}}"
