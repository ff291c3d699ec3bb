#!/bin/sh
# Run one service on this machine: SERVICE, or the first service if SERVICE is empty. Each service has its own ports and, unless
# REDIS_HOST is set, its own Valkey, so several services can run side by side.
# Usage: run.sh
# The script reads SERVICE and VENV, and passes on the service's own settings.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/services.sh"

service=$(chosen | head -n 1)
[ "$service" ] || exit 1
number=$(number "$service")
export BIND_PORT="${BIND_PORT:-$((8080 + number))}" ADMIN_PORT="${ADMIN_PORT:-$((9090 + number))}"
exec "$VENV/bin/python" -m "$service"
