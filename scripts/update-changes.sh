#!/bin/sh
# Show which pinned versions and digests differ between the working copy and the last commit.
# Usage: update-changes.sh
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

shown=$(git --no-pager diff --no-ext-diff --no-color --unified=0 \
  | grep -E '^(\+\+\+ |[-+].*([a-z0-9]==[0-9]|@sha256:|@[0-9a-f]{40}))' \
  | awk '/^\+\+\+ / { file = $0 "\n"; next } { print file $0; file = "" }')
echo "${shown:-nothing is newer}"
