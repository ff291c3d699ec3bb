#!/bin/sh
# Print each engine that can be used, a line each; the first one builds: engines.sh
# Reads ENGINE.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/engine.sh"

choose_engine
engines
