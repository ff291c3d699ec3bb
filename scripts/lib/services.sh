# This file finds the services of the repository: the folders with a `__main__.py`. All scripts and tests use its list.
#
# Each service has a number: 0, 1, 2 ... On a laptop its ports are 8080, 9090 and 5678 plus this number. On a node of a laptop's
# cluster its port is 30080 plus this number. manifests/minikube/kustomization.yaml has this port, and so the number.

number() { # NAME: print the service's number; a service without a node port has the number 0
  [ -f manifests/minikube/kustomization.yaml ] || { echo 0; return; }
  awk -v name="$1" '
    /target:/ { wanted = ($0 ~ "kind: Service, name: " name "}") }
    wanted && match($0, /\/nodePort, value: [0-9]+/) { print substr($0, RSTART + 18, RLENGTH - 18) - 30080; found = 1; exit }
    END { if (!found) print 0 }
  ' manifests/minikube/kustomization.yaml
}

services() { # print the names of all services, in the order of their numbers
  for file in */__main__.py; do
    [ ! -e "$file" ] || echo "$(number "${file%/*}") ${file%/*}"
  done | sort -k 1,1n -k 2 | cut -d ' ' -f 2
}

chosen() { # print the services to work on: SERVICE if it is set, or all; fail if SERVICE is not a service
  all=$(services)
  [ "$all" ] || fail "there is no service: no folder has a __main__.py; to make one: make service NAME=..."
  if [ "${SERVICE:-}" ]; then
    [ -e "$SERVICE/__main__.py" ] \
    || fail "SERVICE=$SERVICE: the services are $(echo "$all" | paste -s -d ' ' -); to make another: make service NAME=..."
    echo "$SERVICE"
  elif [ "$all" != "${all%
*}" ] && [ "${IMAGE:-}${LAYOUT:-}" ]; then
    fail "IMAGE= and LAYOUT= name one image, so name the image's service: SERVICE=..."
  else
    echo "$all"
  fi
}
