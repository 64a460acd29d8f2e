#!/usr/bin/env bash
# The manifests, without a cluster: they render, fit Kubernetes' schemas, agree with each other and with the program; the alerts' tests pass.
source "$(dirname "$0")/lib.sh"
cd "$ROOT"

status=0
scripts/setup-manifests.sh || status=$?
if [[ $status -eq $EXIT_NEEDS_ROOT && ${CI:-} != true ]]; then
    echo "NOT CHECKED: the manifests (see above)"
    exit 0
fi
[[ $status -eq 0 ]] || die "scripts/setup-manifests.sh failed"

rendered=$(mktemp -d)
trap 'rm -rf "$rendered"' EXIT
kubectl=$(kubectl_for_manifests)
for folder in base overlays/self-managed overlays/cert-manager monitoring; do
    "$kubectl" kustomize "manifests/$folder" >"$rendered/${folder##*/}.yaml"
done

"$(kubernetes_schemas)/bin/python3" scripts/check_manifests.py "$rendered"

"$(promtool)" check rules "$rendered"/rules.yaml "$rendered"/dashboard-rules.yaml >"$rendered/promtool.log" || {
    cat "$rendered/promtool.log" >&2
    exit 1
}
for tests in manifests/monitoring/tests/*.yaml; do
    cp "$tests" "$rendered"
    (cd "$rendered" && "$(promtool)" test rules "${tests##*/}" >promtool.log) || {
        cat "$rendered/promtool.log" >&2
        exit 1
    }
done
echo "manifests ok"
