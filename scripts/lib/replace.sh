# How a pin is replaced in files.

replace() { # OLD NEW FILE...: in each file
  old=$1 new=$2
  shift 2
  sed -i.old "s#$old#$new#g" "$@"
  for file; do rm "$file.old"; done
}
