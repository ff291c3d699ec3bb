#!/bin/sh
# Download the packages for images, for amd64 and arm64, and check their hashes.
# Usage: wheels.sh
# The script reads WHEELS, the folder to download into, and VENV, the environment that has pip.
. "${0%/*}/lib/base.sh"
. "${0%/*}/lib/pip.sh"
[ $# = 0 ] || usage

download() { # OPTION...: download packages into the folder $WHEELS.new
  pip_locked download --dest "$WHEELS.new" --python-version 3.13 "$@"
}

if find "$WHEELS/" "$WHEELS.new/" -mindepth 1 -maxdepth 1 ! -name '*.whl' 2>/dev/null | grep -q .; then
  fail "$WHEELS has more than wheels in it: name another folder with WHEELS=..."
fi
# Download into a new folder. The old folder stays until every package is downloaded.
rm -rf "$WHEELS.new"
for machine in x86_64 aarch64; do
  download --implementation cp --abi cp313 -r requirements.txt \
    --platform "manylinux_2_28_$machine" --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine"
done
# The image's target `debug` also contains debugpy, the debugger. One wheel of debugpy fits every platform.
locked debugpy | download --implementation py --platform any -r /dev/stdin || exit
rm -rf "$WHEELS"
mv "$WHEELS.new" "$WHEELS"
