#!/bin/sh
# Print the services of this repository, one a line; the first is the service that `make run` runs without SERVICE=.
# Usage: services.sh [FORMAT]
#   names   print only the names
#   table   print the names, and the ports that each service has on a laptop; this is the default
#   json    print the names as a JSON array, for the matrix of a workflow: services=["one","two"]
. "${0%/*}/lib/base.sh"
[ $# -le 1 ] || usage
. "${0%/*}/lib/services.sh"

case "${1:-table}" in
  names) services ;;
  json) echo "services=[$(services | sed 's/.*/"&"/' | paste -s -d , -)]" ;;
  table)
    printf '%-20s %10s %7s %9s %9s\n' service "make run" admin debugger "node port"
    for name in $(services); do
      number=$(number "$name" 2>&1) || { echo "${number#make: }"; continue; }
      printf '%-20s %10s %7s %9s %9s\n' "$name" $((8080 + number)) $((9090 + number)) $((5678 + number)) $((30080 + number))
    done
    ;;
  *) usage ;;
esac
