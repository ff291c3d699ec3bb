# This file has a function that replaces a pinned version or digest in files.

replace() { # OLD NEW FILE...: replace OLD by NEW in each FILE
  old=$1 new=$2
  shift 2
  sed -i.old "s#$old#$new#g" "$@"
  for file; do rm "$file.old"; done
}
