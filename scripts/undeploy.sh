#!/bin/sh
# Delete the namespace, with the service, Redis and the counts.
# Usage: undeploy.sh
# The script reads the variables of lib/cluster.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/cluster.sh"

check_version
if namespace_exists; then
  kube delete namespace "$NAMESPACE" --timeout=180s
else
  echo "there is no namespace $NAMESPACE" >&2
fi
