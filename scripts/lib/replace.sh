# This file has functions that find and replace a pinned version or digest in the files that git knows.

find_pins() { # ARGUMENT...: run git grep; the first options override the user's settings for the format of the output
  git grep --no-color --no-line-number --no-column "$@"
}

replace() { # OLD NEW FILE...: replace OLD by NEW in each FILE
  old=$1 new=$2
  shift 2
  sed -i.old "s#$old#$new#g" "$@"
  for file; do rm "$file.old"; done
}
