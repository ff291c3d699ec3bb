#!/bin/sh
# Give each NAME:TAG@DIGEST in the repository the digest that the tag has now, as Renovate would: update-images.sh
# Reads ORAS. An image keeps its tag.
# A registry does not say when an image came out, so there is no week's wait as for packages: check what is new before you
# commit it.
# The development container is left alone; its CLI is in .ci/devcontainer/package.json.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/oras.sh"
. "${0%/*}/lib/replace.sh"

git grep -hoE '[a-z0-9][a-z0-9.:-]*(/[a-z0-9._-]+)+:[A-Za-z0-9._-]+@sha256:[0-9a-f]{64}' | sort -u | while read -r image; do
  digest=$("$ORAS" resolve "${image%@*}") || fail "${image%@*} cannot be read"
  # shellcheck disable=SC2046 # several files
  [ "${image#*@}" = "$digest" ] || replace "$image" "${image%@*}@$digest" $(git grep -lF "$image")
done
