# This file finds a release's version, the repositories to publish it in, and the folder of its files.
# The file reads SERVICE, REPOSITORIES and DIST.

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' nanoservice/__init__.py)
folder=$DIST/release

changes() { # print the section of this version in the changelog
  awk -v version="$version" '/^## / { wanted = ($2 == version); next } wanted' CHANGELOG.md | sed '/./,$!d'
}

repositories() { # print the repositories, one on each line
  [ "$REPOSITORIES" ] || fail "which repositories? REPOSITORIES=\"ghcr.io/NAME/$SERVICE docker.io/NAME/$SERVICE\""
  echo "$REPOSITORIES" | tr '[:upper:]' '[:lower:]' | xargs -n 1
}

checksum() { # print the digest of SHA256SUMS, which has the checksums of all files of the release
  [ -f "$folder/SHA256SUMS" ] || fail "there are no files of a release in $folder/; run: make release-files"
  sha256sum "$folder/SHA256SUMS" | cut -d ' ' -f 1
}
