#!/bin/sh
# Run another script of this folder for each service: for SERVICE, or for all services if SERVICE is empty.
# Usage: each.sh NAME.sh
# The script reads SERVICE, IMAGE and LAYOUT. It runs the other script with one service as SERVICE. The default
# of IMAGE is the service's name, and the default of LAYOUT is SERVICE.oci.
. "${0%/*}/lib/base.sh"
[ $# = 1 ] && [ "$1" = "${1##*/}" ] && [ -f "${0%/*}/$1" ] || usage
. "${0%/*}/lib/services.sh"

chosen=$(chosen)
for SERVICE in $chosen; do
  export SERVICE
  IMAGE=${IMAGE:-$SERVICE} LAYOUT=${LAYOUT:-$SERVICE.oci} sh "${0%/*}/$1"
done
