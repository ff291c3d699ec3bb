# This file has functions that run the pip of the environment VENV.
#
# pip's settings may say where packages come from, because many networks have an index or a proxy of their own. Settings that send
# packages elsewhere, or that add or skip packages, must not apply: the environment has to contain what the locks say.
unset PIP_CONSTRAINT PIP_DRY_RUN PIP_PREFIX PIP_PYTHON PIP_REQUIREMENT PIP_ROOT PIP_TARGET
export PIP_USER=0 # unlike a variable that is unset, this also overrides pip's configuration files

pip() { # COMMAND [OPTION...]: run pip; with -I, Python ignores PYTHONPATH and the user's own packages
  "$VENV/bin/python" -I -m pip --disable-pip-version-check "$@"
}

pip_locked() { # COMMAND OPTION...: install or download wheels of a lock, and check their hashes
  command=$1
  shift
  pip "$command" --quiet --no-deps --only-binary :all: --require-hashes "$@"
}
