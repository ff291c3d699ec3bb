# What every script shares. A script sources this first. It works in the current folder, which is the root of the repository.
#
# The sh of macOS is bash 3.2, whose `set -e` does not see that a subshell or a pipeline fails, so these are followed by
# `|| exit`.
set -eu
unset CDPATH # with it, `cd` may go elsewhere

fail() { # MESSAGE...: print it and exit
  echo "make: $*" >&2
  exit 1
}

usage() { # print the comment at the head of the script, and exit with the status that sysexits.h has for wrong usage
  sed -n -e '/^#!/d' -e '/^#/!q' -e 's/^# //p' "$0" >&2
  exit 64
}

remove_work_at_exit() { # remove the folder `work`, however the script exits
  # shellcheck disable=SC2154 # the script sets it
  trap 'rm -rf "$work"' EXIT
  # A shell that a signal kills runs no EXIT trap.
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
}

quietly() { # COMMAND...: run it, with its output in work/log; show that only if it fails
  "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}

locked() { # REGEX: print the lines that the development lock has for the packages of that name
  awk -v name="^($1)==" '/^[a-z]/ { wanted = ($0 ~ name) } wanted' requirements-dev.txt
}

layout_digest() { # FOLDER: print the digest of the manifest or index in an OCI layout
  sed -n 's/.*"digest": *"\(sha256:[0-9a-f]*\)".*/\1/p' "$1/index.json"
}
