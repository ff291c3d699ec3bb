# A script sources this file to use Helm. Go builds Helm once, from a module that is locked with its hashes.
# If HELM is set, the scripts use the helm at this path instead.
HELM=${HELM:-$(go -C "${0%/*}/tools/helm" tool -n helm)} \
|| fail "helm cannot be built (see above): install Go, or name a helm: HELM=..."
