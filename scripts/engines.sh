#!/bin/sh
# Print the engines that can be used, one on each line; the first engine builds images: engines.sh
# Reads ENGINE.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

choose_engine
engines
