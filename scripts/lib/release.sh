# This file finds a release's version, the repositories to publish an image in, and the folder of the release's files.
# The file reads REGISTRIES and DIST, and SERVICE, the service whose image is published.

version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' nanoservice/__init__.py)
folder=$DIST/release

changes() { # print the section of this version in the changelog
  awk -v version="$version" '/^## / { wanted = ($2 == version); next } wanted' CHANGELOG.md | sed '/./,$!d'
}

repositories() { # SERVICE: print the repositories of the service's image, one on each line
  [ "$REGISTRIES" ] || fail "in which registries? REGISTRIES=\"ghcr.io/NAME docker.io/NAME\""
  for registry in $(echo "$REGISTRIES" | tr '[:upper:]' '[:lower:]'); do echo "${registry%/}/$1"; done
}

chart() { # print the path of the release's chart
  echo "$folder/$(sed -n 's/^name: //p' chart/Chart.yaml)-$version.tgz"
}

sha256() { # FILE...: print the checksum and the name of each FILE; macOS has shasum in place of sha256sum
  if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi
}

checksums() { # print the checksum and the name of each file of the release, except SHA256SUMS
  (cd "$folder" && for file in *; do [ "$file" = SHA256SUMS ] || sha256 "$file"; done)
}

checksum() { # print the digest of SHA256SUMS, which has the checksums of all files of the release
  [ -f "$folder/SHA256SUMS" ] || fail "there are no files of a release in $folder/; run: make release-files"
  sha256 "$folder/SHA256SUMS" | cut -d ' ' -f 1
}
