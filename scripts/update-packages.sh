#!/bin/sh
# Write the locks with the newest versions that were published a week ago or earlier.
# Usage: update-packages.sh
# The script reads VENV.
. "${0%/*}/lib/base.sh"
[ $# = 0 ] || usage

PIP_UPLOADED_PRIOR_TO=$("$VENV/bin/python" -c 'import datetime as d; print(d.date.today() - d.timedelta(7))')
export PIP_UPLOADED_PRIOR_TO
UPGRADE=--upgrade sh "${0%/*}/lock.sh"
