#!/bin/sh
# Print each engine that can be used, a line each; the first one builds: engines.sh
# Reads ENGINE.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/engine.sh"
[ $# = 0 ] || usage

choose_engine
engines
