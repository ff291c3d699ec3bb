#!/bin/sh
# In each NAME:TAG@DIGEST in the repository, write the digest that the tag has now, as Renovate does. The script changes no tag.
# Usage: update-images.sh
# The script reads ORAS.
# A registry does not record when an image was published, so this script cannot wait a week, as update-packages.sh does. Check
# what is new before you commit.
# The script does not update the development container, its CLI in .ci/devcontainer/package.json, or redocly.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/replace.sh"

find_pins -hoE '[a-z0-9][a-z0-9.:-]*(/[a-z0-9._-]+)+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' | sort -u | while read -r image; do
  digest=$("$ORAS" resolve "${image%@*}") || fail "${image%@*} cannot be read"
  # shellcheck disable=SC2046 # each file is an argument
  [ "${image#*@}" = "$digest" ] || replace "$image" "${image%@*}@$digest" $(find_pins -lF "$image")
done
