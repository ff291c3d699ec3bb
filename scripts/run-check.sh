#!/bin/sh
# Start the first service with `make run`, send it two requests, and stop it as Ctrl-C does.
# Usage: run-check.sh SECONDS
# The script fails if the service does not answer within SECONDS.
. "${0%/*}/lib/base.sh"
[ $# = 1 ] || usage
. "${0%/*}/lib/services.sh"

work=$(mktemp -d)
remove_work_at_exit
url=http://localhost:$((8080 + $(number "$(services | head -n 1)")))/

fail_with_log() { # MESSAGE: print what `make run` has printed, stop it, and fail
  cat "$work/log" >&2
  kill "$pid" 2>/dev/null || true
  fail "$1; \`make run\` has printed the lines above"
}

began=$(date +%s)
make run >"$work/log" 2>&1 &
pid=$!
until curl --silent --fail --output /dev/null "${url}livez"; do
  kill -0 "$pid" 2>/dev/null || fail_with_log "the service did not start"
  [ $(($(date +%s) - began)) -lt "$1" ] || fail_with_log "the service did not answer within $1 s"
  sleep 0.1
done
echo "the service answered after $(($(date +%s) - began)) s"
curl --silent --show-error --fail "$url" || fail_with_log "GET $url failed"
curl --silent --show-error --fail --data x "$url" || fail_with_log "POST $url failed"
# Ctrl-C interrupts make's child, too. make exits after its child.
kill -INT "$(pgrep -P "$pid")"
wait "$pid" || fail_with_log "the service did not stop with status 0"
grep -q stopped "$work/log" || fail_with_log "the service did not log that it stopped"
