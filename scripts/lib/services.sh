# This file finds the services of the repository: the folders with a `__main__.py` and a name that a service can have. All scripts
# and tests use its list.
#
# Each service has a number: 0, 1, 2 ... On a laptop its ports are 8080, 9090 and 5678 plus this number. On a node of a laptop's
# cluster its port is 30080 plus this number. manifests/minikube/kustomization.yaml has this port, and so the number.

number() { # NAME: print the service's number; fail if the service has no node port
  [ -f manifests/minikube/kustomization.yaml ] || { echo 0; return; }
  awk -v name="$1" '
    /target:/ { wanted = ($0 ~ "kind: Service, name: " name "}") }
    wanted && match($0, /\/nodePort, value: [0-9]+/) { print substr($0, RSTART + 18, RLENGTH - 18) - 30080; found = 1; exit }
    END { exit !found }
  ' manifests/minikube/kustomization.yaml || fail "$1 is not complete: make service NAME=$1"
}

services() { # print the names of all services, in the order of their numbers; a service without a number comes last
  for file in */__main__.py; do
    name=${file%/*}
    # In some locales the range a-z has capital letters, too.
    case $name in [0-9]* | *[!abcdefghijklmnopqrstuvwxyz0-9]*) continue ;; esac
    echo "$( (number "$name") 2>/dev/null || echo 99999) $name"
  done | sort -k 1,1n -k 2 | cut -d ' ' -f 2
}

chosen() { # print the services to work on: SERVICE if it is set, or all; fail if SERVICE is not a service
  all=$(services)
  [ "$all" ] || fail "there is no service: no folder has a __main__.py; to make one: make service NAME=..."
  if [ "${SERVICE:-}" ]; then
    echo "$all" | grep -qxF -e "$SERVICE" \
    || fail "SERVICE=$SERVICE: the services are $(echo "$all" | paste -s -d ' ' -); to make another: make service NAME=..."
    echo "$SERVICE"
  elif [ "$all" != "${all%
*}" ] && [ "${IMAGE:-}${LAYOUT:-}" ]; then
    fail "IMAGE= and LAYOUT= name one image, so name the image's service: SERVICE=..."
  else
    echo "$all"
  fi
}
