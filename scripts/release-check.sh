#!/bin/sh
# Fail unless the changelog has a section for the version. If TAG is given, also fail unless TAG is the version's tag.
# Usage: release-check.sh
# The script reads TAG, and the variables of lib/release.sh.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

[ -z "${TAG:-}" ] || [ "$TAG" = "v$version" ] \
|| fail "the tag is $TAG, and nanoservice/__init__.py has the version $version: the tag has to be v$version"
[ "$(changes)" ] || fail "CHANGELOG.md has nothing on $version: write what changed, as its users see it, under ## $version"
