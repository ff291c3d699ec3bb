#!/bin/sh
# Fail unless the version, its section in the changelog, and TAG, if it is given, are of one release: release-check.sh
# Reads TAG, and what lib/release.sh reads.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage
. "${0%/*}/lib/release.sh"

[ -z "${TAG:-}" ] || [ "$TAG" = "v$version" ] \
|| fail "the tag is $TAG, and $SERVICE/__init__.py has the version $version: it has to be v$version"
[ "$(changes)" ] || fail "CHANGELOG.md has nothing on $version: write what changed, as its users see it, under ## $version"
