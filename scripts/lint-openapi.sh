#!/bin/sh
# Check the OpenAPI document of each service with redocly. npm installs redocly into .tools/redocly, from a lock with hashes.
# Without npm, the script checks nothing; in CI it then fails.
# Usage: lint-openapi.sh
# The script reads VENV and CI.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

if ! command -v npm >/dev/null; then
  [ -z "${CI:-}" ] || fail "redocly is needed: install Node.js with npm"
  echo "make: without npm, OpenAPI documents are not checked by redocly"
  exit
fi
work=$(mktemp -d)
remove_work_at_exit
locked=${0%/*}/tools/redocly tools=.tools/redocly
if ! cmp -s "$locked/package-lock.json" "$tools/installed"; then
  mkdir -p "$tools"
  cp "$locked"/package*.json "$tools"
  quietly npm ci --prefix "$tools" --ignore-scripts --no-audit --no-fund
  cp "$locked/package-lock.json" "$tools/installed"
fi
"$VENV/bin/python" - "$work" <<'END'
import json, sys
from nanoservice.service import document
from tests.support.services import services
for name, service in services().items():
    with open(f"{sys.argv[1]}/{name}.json", "w") as file:
        json.dump(document(service), file, indent=1)
END
export REDOCLY_TELEMETRY=off REDOCLY_SUPPRESS_UPDATE_NOTICE=true
quietly "$tools/node_modules/.bin/redocly" lint --skip-rule=info-license "$work"/*.json
