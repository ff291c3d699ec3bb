# This file has the functions that every script shares. Each script sources this file first.
# The scripts run in the repository's root.
#
# The sh of macOS is bash 3.2, whose `set -e` ignores a failure of a subshell or a pipeline. So the scripts write `|| exit` after
# a subshell or a pipeline.
set -eu
unset CDPATH # if CDPATH is set, `cd` may enter another folder of the same name

# install.sh sets `program` and `failed`. In any other script, the caller's variables of these names must change nothing.
[ "${program:-}" = install.sh ] || program=make failed=1

fail() { # MESSAGE...: print MESSAGE and exit with the status `failed`
  echo "$program: $*" >&2
  exit "$failed"
}

usage() { # print the comment at the head of the script, and exit with 64, the status for wrong usage in sysexits.h
  sed -n -e '/^#!/d' -e '/^#/!q' -e 's/^# //p' "$0" >&2
  exit 64
}

remove_work_at_exit() { # remove the folder `work`, however the script exits
  # shellcheck disable=SC2154 # the script sets `work`
  trap 'rm -rf "$work"' EXIT
  # A shell that a signal kills runs no EXIT trap. So exit on each signal, which runs the EXIT trap above.
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

quietly() { # COMMAND...: run COMMAND with its output in work/log, and print this log only if COMMAND fails
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}

locked() { # REGEX [LOCK]: print those lines of LOCK (or requirements-dev.txt) that lock the packages whose names match REGEX
  awk -v name="^($1)==" '/^[a-z]/ { wanted = ($0 ~ name) } wanted' "${2:-requirements-dev.txt}"
}

layout_digest() { # FOLDER: print the digest of the manifest or index in FOLDER, an OCI layout
  sed -n 's/.*"digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "$1/index.json"
}
