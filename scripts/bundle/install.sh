#!/bin/sh
# Install this bundle on a cluster without internet. Each command can be run again. Each command first checks the files.
# Usage: sh install.sh verify [KEY]
#          check all files, and with KEY also who signed the bundle; KEY is the file of a public key or a fingerprint (SHA256:...)
#        sh install.sh load [docker | ctr]
#          load the images into this machine's Docker or containerd, for example on each node of the cluster
#        sh install.sh push REGISTRY [python | docker]
#          push the images into a registry, such as registry.example.com/team, and print their names in it
#        sh install.sh deploy [REGISTRY]
#          deploy the services and Valkey with the images in REGISTRY, or with the loaded images; print the URLs
#        sh install.sh upgrade [REGISTRY]
#          deploy this bundle in place of the deployed bundle; the registry and the variant stay the same
#        sh install.sh diff [REGISTRY]
#          show what `upgrade` would change; the exit status is 0 if nothing would change, 1 if something would, 2 on failure
# The script reads these variables:
#   NAMESPACE   the namespace in the cluster; the default is the project's name
#   VARIANT     production (the default), another file in manifests/ without its `.yaml`, or chart, which needs Helm
#   VALUES      with VARIANT=chart, a file with values of the chart
#   BUNDLE      for `verify`, the bundle's file; the default is beside this folder
#   REGISTRY_USERNAME, REGISTRY_PASSWORD  for `push` by Python, the user who pushes (`push` by Docker needs docker login); for
#               `deploy`, the user with whom the nodes pull
#   REGISTRY_CA  for `push` by Python, a file with the certificate of the registry's private CA
#   KUBECTL, HELM, CTR, PYTHON  the commands to use
# source/docs/air-gap.md has all steps.
set -eu
unset CDPATH
start=$PWD
cd "$(dirname "$0")"
folder=$PWD
name=${folder##*/}
program=install.sh failed=1

fail() { # MESSAGE...: print MESSAGE and exit with the status `failed`
  echo "$program: $*" >&2
  exit "$failed"
}

usage() { # print the comment at the head of this script, and exit with 64, the status for wrong usage in sysexits.h
  sed -n -e '/^#!/d' -e '/^#/!q' -e 's/^# //p' "$folder/install.sh" >&2
  exit 64
}

absolute() { # PATHS: print a list of paths with colons between them, as KUBECONFIG has it, with an absolute path for each path
  (set -f; IFS=:; for path in $1; do case $path in "" | /*) ;; *) path=$start/$path ;; esac; printf %s: "$path"; done)
}

has() { command -v "$1" >/dev/null; }

# --- verify ---

sums() { # FILE...: print the checksum and the name of each FILE
  if has sha256sum; then sha256sum "$@"; else shasum -a 256 "$@"; fi
}

check_files() { # fail unless the folder has exactly the files of the bundle, unchanged
  { has sha256sum || has shasum; } || fail "sha256sum or shasum is needed"
  [ -f SHA256SUMS ] || fail "SHA256SUMS is missing beside install.sh: unpack the bundle again"
  cp SHA256SUMS "$work/wanted"
  # The folder bases/ comes from the second file, and has checksums of its own.
  if [ -d bases ]; then
    [ -f bases/SHA256SUMS ] || fail "bases/SHA256SUMS is missing: unpack the bundle again"
    sed 's|  |  bases/|' bases/SHA256SUMS >>"$work/wanted"
  fi
  # A symbolic link or a pipe in place of a file is a change. The file pushed.txt is not a change, because `push` writes it.
  find . ! -type d ! \( -type f \( -path ./SHA256SUMS -o -path ./bases/SHA256SUMS -o -path ./pushed.txt \) \) >"$work/there" \
  || fail "not all folders can be read (see above)"
  # Read only regular files, because a pipe would block. Leave out names with a blank, because no file of a bundle has one.
  find . -type f | grep '^\./[^[:blank:]]*$' >"$work/files"
  # shellcheck disable=SC2046 # each name is an argument
  (set -f; sums $(cat "$work/files")) >"$work/sums" || true
  awk '
    FILENAME == ARGV[1] { wanted[substr($0, 67)] = $1; next }
    FILENAME == ARGV[2] { is[substr($0, 69)] = $1; next }
    { name = $0; sub("^[.]/", "", name) }
    # `find` prints a name with a line end as two lines. If both lines are names of the bundle, each name is there twice.
    there[name]++ == 1 { print name " exists twice" }
    END {
      for (name in wanted) {
        if (!(name in there)) print name " is missing"
        else if (is[name] != wanted[name]) print name " is changed"
      }
      for (name in there) if (!(name in wanted)) print name " is not of this bundle"
    }' "$work/wanted" "$work/sums" "$work/there" >"$work/found" || fail "the files cannot be checked (see above)"
  [ ! -s "$work/found" ] || {
    sort "$work/found" >&2
    fail "this is not the bundle as it was made (see above): unpack it again into a new folder"
  }
}

fingerprints() { # KEY: print the fingerprints of the public keys in a file, or KEY itself if it is a fingerprint
  case $1 in SHA256:*) echo "$1"; return ;; esac
  # A path is never relative to this folder: a key inside the bundle proves nothing.
  case $1 in /*) key=$1 ;; *) key=$start/$1 ;; esac
  [ -f "$key" ] || fail "$1 is neither a file nor a fingerprint (SHA256:...)"
  ssh-keygen -l -f "$key" >"$work/keys" || fail "$1 has no public key (see above)"
  cut -d ' ' -f 2 "$work/keys"
}

check_signature() { # KEY FILE: fail unless FILE is signed by KEY, and the bundle in this folder is from FILE
  [ -f "$2" ] || fail "$2 is missing: copy it beside this folder, or name it: BUNDLE=..."
  [ -f "$2.sig" ] || fail "$2.sig, the signature, is missing: copy it beside $2"
  wanted=$(fingerprints "$1") || exit
  said=$(ssh-keygen -Y check-novalidate -n file -s "$2.sig" <"$2" 2>&1) || {
    case $said in *" option -- "*) fail "who made $2 was not checked, because ssh-keygen is older than OpenSSH 8.1: $said" ;; esac
    fail "$2 is not the file that was signed: $said"
  }
  # The message ends with the fingerprint.
  is=${said##* }
  echo "$wanted" | grep -qxF -e "$is" || fail "$2 is signed by another key: $said, and not by $wanted"
  tar -xOf "$2" "$name/$3" | cmp -s - "$3" || fail "this folder is not from $2: unpack that file again"
  echo "$2 is signed by $is"
}

verify() { # [KEY]
  # Refuse an empty KEY, which can come from an unset variable: sh install.sh verify "$KEY".
  [ $# = 0 ] || [ "$1" ] || usage
  check_files
  echo "all files are as the bundle's checksums say"
  [ ! -f pushed.txt ] || echo "pushed.txt was not checked: it has the digests of the images that \`push\` pushed"
  bundle=${BUNDLE:-../$name.tar}
  if [ "${1:-}" ] && has ssh-keygen; then
    check_signature "$1" "$bundle" SHA256SUMS
    if [ -d bases ]; then check_signature "$1" "${bundle%.tar}-bases.tar" bases/SHA256SUMS; fi
  elif [ "${1:-}" ]; then
    fail "who made the bundle was not checked, because there is no ssh-keygen: check the signature on another machine"
  else
    echo "who made the bundle was not checked; to check it, name the key that you trust: sh install.sh verify KEY"
  fi
}

# --- images ---

layouts() { # print the folders with images
  echo images
  if [ -d bases ]; then echo bases; fi
}

stream() { # FOLDER: print the images of an OCI layout as an archive for `docker load` and `ctr images import`
  case $(uname -m) in x86_64 | amd64) machine=amd64 ;; *) machine=arm64 ;; esac
  # Docker's classic image store reads only manifest.json, which can have only one platform.
  rm -rf "$work/layout"
  mkdir "$work/layout"
  ln -s "$folder/$1/blobs" "$folder/$1/index.json" "$folder/$1/oci-layout" "$work/layout"
  ln -s "$folder/$1/docker-$machine.json" "$work/layout/manifest.json"
  tar -chf - -C "$work/layout" blobs index.json oci-layout manifest.json
}

docker_answers() { # succeed if Docker answers within 30 s
  docker version >/dev/null 2>&1 &
  asked=$!
  { sleep 30; kill "$asked"; } >/dev/null 2>&1 &
  limit=$!
  answered=0
  wait "$asked" || answered=1
  kill "$limit" 2>/dev/null || true
  return $answered
}

load() { # [docker | ctr]
  tool=${1:-} ctr=${CTR:-ctr}
  if [ ! "$tool" ]; then
    tool=ctr
    # If Docker does not answer and there is no ctr, Docker's own error is the useful one.
    if docker_answers || { has docker && ! has "${ctr%% *}"; }; then tool=docker; fi
  fi
  for layout in $(layouts); do
    case $tool in
      docker) stream "$layout" | docker load ;;
      # Kubernetes uses the images in this namespace of containerd.
      ctr) stream "$layout" | $ctr --namespace=k8s.io images import - ;;
      *) usage ;;
    esac || fail "the images cannot be loaded by $tool (see above)"
  done
}

push_by_docker() { # LAYOUT REGISTRY: load the images into Docker, push them, and print their names in the registry
  stream "$1" | docker load >&2 || fail "the images cannot be loaded into Docker (see above)"
  sed -n 's/.*"io.containerd.image.name": "\([^"@]*\)".*/\1/p' "$1/index.json" | while read -r image; do
    there=$2/${image##*/}
    if ! { docker tag "$image" "$there" && docker push "$there" >"$work/said"; }; then
      cat "$work/said" >&2
      exit 1
    fi
    # Docker's classic image store compresses the layers again, and pushes one platform only, so the image gets another digest.
    digest=$(sed -n 's/.* digest: \(sha256:[0-9a-f]*\) .*/\1/p' "$work/said")
    [ "$digest" ] || fail "docker does not print the digest of $there"
    echo "${there%:*}@$digest"
  done
}

check_registry() { # REGISTRY: fail unless REGISTRY can be the beginning of an image's name
  printf %s "$1" | tr '\n' ' ' \
  | grep -Eqx '([0-9A-Za-z_][0-9A-Za-z_.-]*|\[[0-9A-Fa-f:]+\])(:[0-9]{1,5})?(/[a-z0-9._/-]*[a-z0-9])?' \
  || fail "REGISTRY must be HOST[:PORT][/PATH], with PATH in lower case, without https:// and without a password"
}

push() { # REGISTRY [python | docker]
  registry=${1%/}
  check_registry "$registry"
  python=${PYTHON:-python3}
  tool=${2:-}
  if [ "$tool" != docker ] && ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then
    { [ ! "$tool" ] && has docker; } || fail "to push, Python 3.8 or newer is needed (PYTHON=...), or Docker"
    tool=docker
  fi
  tool=${tool:-python}
  for layout in $(layouts); do
    case $tool in
      python) "$python" push.py "$layout" "$registry" ;;
      docker) push_by_docker "$layout" "$registry" ;;
      *) usage ;;
    esac >>"$work/pushed" || fail "the images are not all in $registry (see above); run this command again"
  done
  cat "$work/pushed"
  if ! { touch pushed.txt && [ -w pushed.txt ]; }; then
    [ "$tool" != python ] || return 0 # the images kept their digests, so `deploy` needs no pushed.txt
    fail "pushed.txt cannot be written (see above), and \`deploy\` needs the digests in it:" \
      "copy the folder to a disk that you can write to, and push from there"
  fi
  # Keep the lines of other registries.
  awk -v registry="$registry" '{ it = $0; sub("/[^/]*$", "", it) } it != registry' pushed.txt >"$work/new"
  cat "$work/pushed" >>"$work/new"
  cat "$work/new" >pushed.txt
}

# --- the cluster ---

image_in() { # REGISTRY IMAGE: print the name of IMAGE (NAME@DIGEST) in REGISTRY
  base=${2%@*}
  there=$1/${base##*/}
  # If pushed.txt has a line for the image, this line has the image's digest in the registry.
  digest=
  [ ! -f pushed.txt ] || digest=$(awk -F @ -v there="$there" '
    NF == 2 && $1 == there && length($2) == 71 && $2 ~ /^sha256:[0-9a-f]+$/ { print $2; exit }' pushed.txt)
  echo "$there@${digest:-${2#*@}}"
}

use_source() { # enter source/, load the functions of its scripts, and check that a cluster answers
  cd "$folder/source"
  project=$(sed -n 's/^  name: //p' manifests/namespace/namespace.yaml)
  export KUBECTL="${KUBECTL:-kubectl}" NAMESPACE="${NAMESPACE:-$project}" REGISTRY=
  . scripts/lib/base.sh
  . scripts/lib/cluster.sh
  . scripts/lib/services.sh
  . scripts/lib/deploy.sh
  check_version
  version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' nanoservice/__init__.py)
}

choose() { # COMMAND [REGISTRY]: set variant and registry, from VARIANT and REGISTRY, or else from the deployed bundle
  installed=
  if namespace_exists; then
    installed=$(k get namespace "$NAMESPACE" --output=jsonpath='{.metadata.annotations.installed-bundle}')
  fi
  # shellcheck disable=SC2086 # `installed` has the words version, variant and registry
  set -- "$1" "${2:-}" $installed
  [ "$1" = deploy ] || [ "${3:-}" ] || fail "no bundle is deployed in the namespace $NAMESPACE: sh install.sh deploy"
  from=${3:-}
  variant=${VARIANT:-${4:-production}}
  registry=${2:-${5:-}}
  registry=${registry%/}
  [ ! "$registry" ] || check_registry "$registry"
  variants=chart
  for file in "$folder"/manifests/*.yaml; do
    file=${file##*/}
    variants="$variants ${file%.yaml}"
  done
  case " $variants " in *" $variant "*) ;; *) fail "VARIANT=$variant: the variants are $variants" ;; esac
  [ "$variant" = chart ] || [ ! "${VALUES:-}" ] || fail "only the chart has values: set VARIANT=chart, or leave VALUES out"
}

images() { # print a line for each image: NAME-IN-THE-MANIFESTS NAME@DIGEST
  while read -r line; do
    image=${line#*=}
    there=$image
    [ ! "$registry" ] || there=$(cd "$folder" && image_in "$registry" "$image")
    echo "${image%@*} $there"
  done <"$folder/images.txt"
}

write_manifests() { # write a kustomization of the chosen variant into the folder work/deploy
  mkdir "$work/deploy"
  cp "$folder/manifests/$variant.yaml" "$work/deploy"
  # Kustomize accepts components only by relative path.
  cp -R manifests/components "$work"
  images >"$work/named"
  sed 's/\(.*\) \(.*\)@\(.*\)/  - {name: "\1", newName: "\2", digest: "\3"}/' "$work/named" >"$work/images"
  kustomization "$variant.yaml" <"$work/images" >"$work/deploy/kustomization.yaml"
}

run_helm() { # COMMAND...: run Helm with the bundle's chart, the chosen images, and VALUES or the values of the release
  release=$(sed -n 's/^name: //p' chart/Chart.yaml)
  values=${VALUES:-$work/values.yaml}
  [ "${VALUES:-}" ] || "${HELM:-helm}" get values "$release" --namespace="$NAMESPACE" --output=yaml >"$values" 2>"$work/said" \
  || grep -q 'release: not found' "$work/said" || { cat "$work/said" >&2; return 1; }
  set -- "$@" "$release" "$folder"/*.tgz --namespace="$NAMESPACE" --values="$values"
  while read -r line; do
    key=${line%%=*}
    image=$(images | grep "^$(echo "${line#*=}" | cut -d @ -f 1) ")
    case $key in */*) key=store.image ;; *) key=services.$key.image ;; esac
    set -- "$@" --set="$key=${image#* }"
  done <"$folder/images.txt"
  "${HELM:-helm}" "$@"
}

pull_secret() { # let the nodes pull the pods' images with REGISTRY_USERNAME and REGISTRY_PASSWORD
  case $REGISTRY_USERNAME${REGISTRY_PASSWORD:-} in
    *[[:cntrl:]]*) fail "REGISTRY_USERNAME or REGISTRY_PASSWORD has a line end or another control character" ;;
  esac
  escape='s/[\\"]/\\&/g'
  user=$(printf %s "$REGISTRY_USERNAME" | sed "$escape") password=$(printf %s "${REGISTRY_PASSWORD:-}" | sed "$escape")
  # Give kubectl the password in a file, because `ps` shows every command line to every user.
  (umask 077; printf '{"auths": {"%s": {"username": "%s", "password": "%s"}}}' "${registry%%/*}" "$user" "$password" \
    >"$work/.dockerconfigjson")
  k create secret generic registry --type=kubernetes.io/dockerconfigjson --from-file="$work/.dockerconfigjson" \
    --dry-run=client --output=yaml >"$work/secret.yaml"
  k apply --server-side --force-conflicts --filename="$work/secret.yaml" >&2
  # Pods that name no service account use this service account, and its pull secrets.
  k apply --server-side --force-conflicts --filename=- >&2 <<END
apiVersion: v1
kind: ServiceAccount
metadata: {name: default}
imagePullSecrets: [{name: registry}]
END
}

deploy() { # deploy the chosen variant with the images in the chosen registry
  if [ "$variant" = chart ]; then
    components=$(needed_components | paste -s -d ' ' -)
    [ ! "$components" ] || fail "this cluster needs components that the chart does not have ($components):" \
      "use another variant, such as production"
  fi
  make_namespace
  if [ "$registry" ] && [ "${REGISTRY_USERNAME:-}" ]; then pull_secret; fi
  if [ "$variant" = chart ]; then
    # Like `kubectl apply` below, Helm takes over the objects of another variant, and fields that someone has changed.
    run_helm upgrade --install --take-ownership --force-conflicts --wait --timeout=300s >&2 || fail "Helm failed (see above)"
  else
    sh scripts/secret.sh >&2
    write_manifests
    k apply --server-side --force-conflicts --kustomize="$work/deploy" >&2
  fi
  workloads=$(k get statefulsets,deployments --selector=app.kubernetes.io/part-of=hitcounter --output=name)
  for it in $workloads; do
    (wait_for "$it") || {
      [ ! "$from" ] || fail "the services' pods of version $from still run." \
        "To go back, run \`sh install.sh upgrade\` in the folder of its bundle"
      exit 1
    }
  done
  k annotate namespace "$NAMESPACE" --overwrite installed-bundle="$version $variant${registry:+ $registry}" >&2
  # shellcheck disable=SC2046 # each service is an argument
  print_urls $(services)
}

show_diff() { # show what `upgrade` would change; return kubectl's status: 0 without a change, 1 with a change, more on failure
  if [ "$variant" = chart ]; then
    run_helm template --no-hooks >"$work/rendered" || fail "Helm failed (see above)"
    k diff --server-side --force-conflicts --filename="$work/rendered"
  else
    write_manifests
    k diff --server-side --force-conflicts --kustomize="$work/deploy"
  fi
}

# --- the commands ---

# The script has left the user's folder, so make the relative paths in these variables absolute, except commands on PATH.
for variable in BUNDLE VALUES REGISTRY_CA DOCKER_CONFIG TMPDIR KUBECTL HELM PYTHON; do
  path=
  eval "path=\${$variable:-}"
  case $variable:$path in *: | *:/* | KUBECTL:"${path#*/}" | HELM:"${path#*/}" | PYTHON:"${path#*/}") continue ;; esac
  eval "$variable=\$start/\$path"
done
if [ "${KUBECONFIG:-}" ]; then
  KUBECONFIG=$(absolute "$KUBECONFIG")
  KUBECONFIG=${KUBECONFIG%:}
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
command=${1:-}
[ $# = 0 ] || shift
case "$command:$#" in
  verify:[01]) verify "$@" ;;
  load:[01]) check_files; load "$@" ;;
  push:[12]) check_files; push "$@" ;;
  deploy:[01] | upgrade:[01] | diff:[01])
    if [ "$command" = diff ]; then failed=2; fi # kubectl's status 1 means that something would change
    check_files
    use_source
    choose "$command" "$@"
    case $command in
      deploy) deploy ;;
      upgrade)
        echo "upgrade from $from to $version ($variant)" >&2
        deploy
        ;;
      diff) show_diff ;;
    esac
    ;;
  *) usage ;;
esac
