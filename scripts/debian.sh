#!/bin/sh
# Unpack packages of Debian, and the packages that they depend on, into a folder. The machine's own packages do not change.
# Usage: debian.sh FOLDER/done SUITE PACKAGE...
# SUITE is the code name of a release of Debian, such as trixie.
# The folder FOLDER/bin gets a command for each program of the packages, which runs with the C library of this release.
# At the end the script touches FOLDER/done, because make compares the time of this file. The script reads DEBIAN_MIRROR.
. "${0%/*}/lib/base.sh"

[ $# -ge 3 ] && [ "${1%/done}" != "$1" ] || usage
mkdir -p "${1%/done}"
folder=$(cd "${1%/done}" && pwd)
suite=$2
shift 2
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
if ! command -v apt-get >/dev/null || ! command -v dpkg-deb >/dev/null || [ ! -e "$keyring" ]; then
  fail "this needs apt, dpkg and debian-archive-keyring, as Debian has them"
fi

work=$(mktemp -d)
remove_work_at_exit
mkdir -p "$work/lists/partial" "$work/cache/archives/partial"
echo "deb [signed-by=$keyring] $DEBIAN_MIRROR $suite main" >"$work/sources.list"
# The status counts these packages as installed. Only scripts of packages need them, and none of these scripts is run.
for package in debconf dpkg; do
  printf 'Package: %s\nStatus: install ok installed\nArchitecture: all\nMulti-Arch: foreign\n' "$package"
  printf 'Version: 999\nMaintainer: -\nDescription: -\nProvides: debconf-2.0\n\n'
done >"$work/status"

apt() {
  apt-get -qq -o Dir::Etc::sourcelist="$work/sources.list" -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferencesparts=/dev/null -o Dir::State::lists="$work/lists" -o Dir::State::status="$work/status" \
    -o Dir::Cache="$work/cache" -o APT::Sandbox::User="$(id -un)" -o Debug::NoLocking=1 -o Acquire::Languages=none "$@"
}
echo "fetching packages of Debian $suite into $folder, once: $*"
quietly apt update
quietly apt install --yes --download-only --no-install-recommends "$@"
for package in "$work"/cache/archives/*.deb; do dpkg-deb -x "$package" "$folder"; done

# The loader of this release runs each program. `--argv0` and `lib` let Python find its environment and its standard library.
rm -rf "${folder:?}/bin"
ln -sfn usr/lib "$folder/lib"
# `python -m venv` looks for the wheel of pip at the absolute path that this file has.
for file in "$folder"/usr/lib/python3*/_sysconfigdata_*.py; do
  [ ! -e "$file" ] || sed -i "s:'/usr/share/python-wheels:'$folder/usr/share/python-wheels:" "$file"
done
# Alertmanager reads its templates at the absolute path that this program has. A path of the same length that is relative can
# replace it: then Alertmanager finds the templates if FOLDER is its working directory.
file=$folder/usr/bin/prometheus-alertmanager
[ ! -e "$file" ] || sed -i 's:/usr/share/prometheus/alertmanager:usr/share//prometheus/alertmanager:g' "$file"
mkdir "$folder/bin.new"
loader=$(find "$folder/usr" -type f -name 'ld-linux*.so.*')
for program in "$folder"/usr/bin/* "$folder"/usr/sbin/*; do
  [ -e "$program" ] || continue
  [ "$(head -c 4 "$program" | tail -c 3)" = ELF ] || continue
  command=$folder/bin.new/${program##*/}
  if [ ! "$loader" ]; then
    ln -s "$program" "$command" # the packages need no C library, so the program is static
    continue
  fi
  # shellcheck disable=SC2016 # the command that is written expands $0 and $@
  printf '#!/bin/sh\nexec "%s" --argv0 "$0" --library-path "%s" "%s" "$@"\n' "$loader" "${loader%/*}" "$program" >"$command"
  chmod +x "$command"
done
mv "$folder/bin.new" "$folder/bin"
touch "$folder/done"
