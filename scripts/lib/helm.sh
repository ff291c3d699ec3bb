# The scripts and tests use Helm. Go builds Helm once, from a module that is locked with its hashes.
# If HELM is set, the scripts use the helm at this path instead.
HELM=${HELM:-$(go -C "${0%/*}/tools/helm" tool -n helm)} \
|| fail "helm is needed: install Go, which builds it, or name one: HELM=..."
