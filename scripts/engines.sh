#!/bin/sh
# Print the container engines that can be used, one a line. The scripts build images with the first one.
# Usage: engines.sh
# The script reads ENGINE.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

choose_engine
engines
