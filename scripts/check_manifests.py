"""What check-manifests.sh asks of the rendered manifests and of the examples. Its argument is the folder with the former.

Writes rules.yaml and dashboard-rules.yaml there: the alerts, and the dashboard's expressions as rules, for promtool.
"""

import json
import re
import sys
from pathlib import Path

import kubernetes_validate
import yaml

RENDERED = Path(sys.argv[1])
# The oldest that is supported, and the newest that is known.
KUBERNETES = ("1.29", "1.37")
# Not Kubernetes' own: no schema.
OTHERS = {
    ("monitoring.coreos.com/v1", "PodMonitor"),
    ("monitoring.coreos.com/v1", "PrometheusRule"),
    ("cert-manager.io/v1", "Issuer"),
    ("cert-manager.io/v1", "Certificate"),
}
# Metrics that are others'.
FOREIGN_METRICS = {
    "up",
    "kube_job_failed",
    "kube_pod_init_container_info",
    "kube_pod_status_phase",
    "apiserver_admission_webhook_rejection_count",
}
NAME, NAMESPACE = "pgsidecar-webhook", "pgsidecar-system"
errors = []


def check(holds, message):
    if not holds:
        errors.append(message)


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def pod_of(document):
    """The pod's spec, its metadata, and whether it has one at all."""
    spec = document.get("spec", {})
    if document["kind"] == "CronJob":
        spec = spec["jobTemplate"]["spec"]
    template = spec.get("template")
    return (template["spec"], template.get("metadata", {})) if template else (None, None)


def restricted(pod, where):
    """Pod Security Standards, restricted."""
    context = pod.get("securityContext", {})
    check(context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0, f"{where}: runs as root")
    check(context.get("seccompProfile", {}).get("type") == "RuntimeDefault", f"{where}: no seccomp profile")
    check(not pod.get("hostNetwork") and not pod.get("hostPID"), f"{where}: the host's namespaces")
    allowed = {"name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    for volume in pod.get("volumes", []):
        check(set(volume) <= allowed, f"{where}: volume {volume['name']}")
    for container in pod["containers"] + pod.get("initContainers", []):
        here = f"{where}, container {container['name']}"
        own = container.get("securityContext", {})
        check(own.get("allowPrivilegeEscalation") is False, f"{here}: may escalate its privileges")
        check(own.get("capabilities", {}).get("drop") == ["ALL"], f"{here}: has capabilities")
        check("memory" in container.get("resources", {}).get("limits", {}), f"{here}: has no limit of memory")
        mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
        volumes = {volume["name"] for volume in pod.get("volumes", [])}
        check(mounts <= volumes | {"data"}, f"{here}: mounts {mounts - volumes}, which there isn't")


def schemas(path):
    for document in documents(path):
        kind = (document["apiVersion"], document["kind"])
        where = f"{path.name}: {document['kind']} {document['metadata']['name']}"
        if kind in OTHERS or document["kind"] == "Kustomization":
            continue
        for version in KUBERNETES:
            try:
                kubernetes_validate.validate(document, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                errors.append(f"{where}: Kubernetes {version}: {error.message} at {list(error.path)}")
        pod, _ = pod_of(document)
        if pod:
            restricted(pod, where)


def by_kind(path):
    found = {}
    for document in documents(path):
        found.setdefault(document["kind"], {})[document["metadata"]["name"]] = document
    return found


def webhook(path, self_managed):
    """Of one overlay: that its objects belong together, and may do no more than they must."""
    objects, where = by_kind(path), path.name
    deployment, service = objects["Deployment"][NAME], objects["Service"][NAME]
    pod, metadata = pod_of(deployment)
    (container,) = pod["containers"]
    labels = metadata["labels"].items()
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = objects[kind][NAME]["spec"]
        selector = spec.get("selector", spec.get("podSelector"))
        selector = selector.get("matchLabels", selector)
        check(selector and selector.items() <= labels, f"{where}: the {kind} selects other pods")
    check(deployment["spec"]["selector"]["matchLabels"].items() <= labels, f"{where}: the Deployment selects other pods")
    for kind, name, document in ((k, n, d) for k, named in objects.items() for n, d in named.items()):
        cluster_wide = kind in ("Namespace", "PriorityClass", "ClusterRole", "ClusterRoleBinding", "MutatingWebhookConfiguration")
        check(cluster_wide or document["metadata"].get("namespace") == NAMESPACE, f"{where}: {kind} {name} has another namespace")
    check(list(objects["Namespace"]) == [NAMESPACE], f"{where}: the namespace's name")
    check(pod["serviceAccountName"] in objects["ServiceAccount"], f"{where}: no such ServiceAccount")
    check(pod["priorityClassName"] in objects["PriorityClass"], f"{where}: no such PriorityClass")
    ports = {port["name"] for port in container["ports"]}
    environment = {variable["name"]: variable.get("value") for variable in container["env"]}
    check(environment["PGSIDECAR_WEBHOOK_IMAGE"] == container["image"], f"{where}: it injects another image than its own")
    check(deployment["spec"]["replicas"] == 2, f"{where}: two replicas")
    check(container["securityContext"].get("readOnlyRootFilesystem") is True, f"{where}: the root file system can be written to")

    (hook,) = objects["MutatingWebhookConfiguration"][NAME]["webhooks"]
    called = hook["clientConfig"]
    (port,) = [port for port in service["spec"]["ports"] if port["port"] == called["service"]["port"]]
    check(port["targetPort"] in ports, f"{where}: the Service's port leads nowhere")
    check((called["service"]["name"], called["service"]["namespace"]) == (NAME, NAMESPACE), f"{where}: another Service is called")
    check("caBundle" not in called, f"{where}: applying it would replace the caBundle")
    excluded = hook["namespaceSelector"]["matchExpressions"][0]["values"]
    check(excluded == ["kube-system", NAMESPACE], f"{where}: the namespaces that are left out")
    expected = {
        "name": "inject.pgsidecar.dev", "failurePolicy": "Fail", "sideEffects": "None", "matchPolicy": "Equivalent",
        "reinvocationPolicy": "IfNeeded", "timeoutSeconds": 5, "admissionReviewVersions": ["v1"],
        "objectSelector": {"matchExpressions": [
            {"key": "pgsidecar.dev/inject", "operator": "Exists"},
            {"key": "pgsidecar.dev/inject", "operator": "NotIn", "values": ["false"]},
        ]},
    }
    for key, value in expected.items():
        check(hook.get(key) == value, f"{where}: {key} of the webhook is {hook.get(key)}")
    (rule,) = hook["rules"]
    check((rule["resources"], rule["operations"], rule["scope"]) == (["pods"], ["CREATE"], "Namespaced"), f"{where}: the rule")

    check(pod["automountServiceAccountToken"] is self_managed, f"{where}: the token is mounted where it isn't needed, or the reverse")
    rules = [(kind, rule) for kind in ("Role", "ClusterRole") for role in objects.get(kind, {}).values() for rule in role["rules"]]
    allowed = [
        ("Role", {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["pgsidecar-webhook-ca"], "verbs": ["get", "update"]}),
        ("ClusterRole", {
            "apiGroups": ["admissionregistration.k8s.io"], "resources": ["mutatingwebhookconfigurations"],
            "resourceNames": [NAME], "verbs": ["get", "patch"],
        }),
    ]
    check(rules == (allowed if self_managed else []), f"{where}: it may do something else than it should")
    if self_managed:
        check(not {"data", "stringData"} & set(objects["Secret"]["pgsidecar-webhook-ca"]), f"{where}: the Secret isn't empty")
        for kind, role in (("RoleBinding", "Role"), ("ClusterRoleBinding", "ClusterRole")):
            binding = objects[kind][NAME]
            check(binding["roleRef"]["name"] in objects[role], f"{where}: {kind} to no role")
            subjects = [(one["name"], one["namespace"]) for one in binding["subjects"]]
            check(subjects == [(NAME, NAMESPACE)], f"{where}: {kind} for {subjects}")
    else:
        leaf = objects["Certificate"][NAME]
        injected = objects["MutatingWebhookConfiguration"][NAME]["metadata"]["annotations"]["cert-manager.io/inject-ca-from"]
        check(injected == f"{NAMESPACE}/{NAME}", f"{where}: the caBundle of another certificate")
        check(f"{NAME}.{NAMESPACE}.svc" in leaf["spec"]["dnsNames"], f"{where}: a certificate for another name")
        secrets = [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume]
        check(secrets == [leaf["spec"]["secretName"]], f"{where}: another certificate is mounted")


def program_metrics():
    """The names of all metrics, as they are exposed, from the code that registers them."""
    names = set()
    sources = [("pgsidecar", Path("src/metrics.rs"))]
    sources += [("pgsidecar_webhook", path) for path in Path("webhook/src").rglob("*.rs")]
    for prefix, path in sources:
        text = path.read_text()
        # The name is followed by its help; what it's registered as follows that.
        for match in re.finditer(r'[(\s]"([a-z][a-z0-9_]+)",\s*"[A-Z0-9][^"]*",?\s*(?=([^;]{0,120}))', text):
            name, kind = f"{prefix}_{match[1]}", match[2]
            if kind.startswith("Info::"):
                names.add(f"{name}_info")
            elif kind.startswith("ConstCounter") or (prefix == "pgsidecar_webhook" and "gauge" not in kind.lower()):
                # Of the webhook's it isn't known from the place; a name that isn't exposed is let pass there.
                names.update({f"{name}_total", f"{name}_info", name} if prefix == "pgsidecar_webhook" else {f"{name}_total"})
                names.update(f"{name}{suffix}" for suffix in ("_bucket", "_sum", "_count") if prefix == "pgsidecar_webhook")
            else:
                names.add(name)
    return names


def metrics_in(expression):
    # Without what stands in braces and in grouping: labels and their values.
    bare = re.sub(r"\{[^}]*\}", "", expression)
    bare = re.sub(r"\b(by|without|on|ignoring)\s*\([^)]*\)", "", bare)
    return set(re.findall(r"\b(pgsidecar_[a-z0-9_]+|up|kube_[a-z0-9_]+|apiserver_[a-z0-9_]+)\b", bare))


def monitoring(known):
    objects = by_kind(RENDERED / "monitoring.yaml")
    rules = objects["PrometheusRule"]["pgsidecar"]["spec"]
    (RENDERED / "rules.yaml").write_text(yaml.safe_dump(rules))
    sections = set(re.findall(r"^## (Pgsidecar\w+)$", Path("docs/runbooks.md").read_text(), re.MULTILINE))
    tested = "".join(path.read_text() for path in Path("manifests/monitoring/tests").glob("*.yaml"))
    alerts = [alert for group in rules["groups"] for alert in group["rules"]]
    for alert in alerts:
        name = alert["alert"]
        check(alert["labels"].get("severity") in ("critical", "warning"), f"{name}: no severity")
        check({"summary", "description", "runbook"} == set(alert["annotations"]), f"{name}: its annotations")
        check(alert["annotations"].get("runbook") == f"docs/runbooks.md#{name.lower()}", f"{name}: leads to another runbook")
        check(re.search(rf"alertname: {name}\b[^-]*exp_alerts", tested), f"{name}: no test in which it fires")
        for metric in metrics_in(alert["expr"]) - FOREIGN_METRICS:
            check(metric in known, f"{name}: there is no metric {metric}")
    names = [alert["alert"] for alert in alerts]
    check(set(names) == sections and len(names) == len(sections), f"alerts and runbooks differ: {sections ^ set(names)}")

    (text,) = objects["ConfigMap"]["pgsidecar-dashboard"]["data"].values()
    dashboard = json.loads(text)
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    check({"datasource", "namespace", "workload"} <= variables, "the dashboard lacks a variable")
    panels = dashboard["panels"]
    check(len({panel["id"] for panel in panels}) == len(panels), "two panels of the dashboard have one id")
    places = set()
    expressions = []
    for panel in panels:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        check(not cells & places and place["x"] + place["w"] <= 24, f"dashboard: {panel['title']} lies over another panel")
        places |= cells
        for target in panel.get("targets", []):
            check(target["datasource"]["uid"] == "${datasource}", f"dashboard: {panel['title']} names a data source")
            for metric in metrics_in(target["expr"]) - FOREIGN_METRICS:
                check(metric in known, f"dashboard: {panel['title']}: there is no metric {metric}")
            expressions.append(target["expr"].replace("$__rate_interval", "5m"))
    recorded = [{"record": f"dashboard:{number}", "expr": expression} for number, expression in enumerate(expressions)]
    (RENDERED / "dashboard-rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))

    # What the documentation calls a metric is one, and the sidecar's are all there.
    documented = set(re.findall(r"^\| `(pgsidecar_[a-z0-9_]+)", Path("docs/api.md").read_text(), re.MULTILINE))
    own = {metric for metric in known if not metric.startswith("pgsidecar_webhook_")}
    check(own == documented, f"docs/api.md and the program differ in the metrics {own ^ documented}")
    for path in [Path("README.md"), *Path("docs").glob("*.md")]:
        for metric in set(re.findall(r"`(pgsidecar_[a-z0-9_]+)[`{]", path.read_text())):
            check(metric in known, f"{path}: there is no metric {metric}")


def images():
    """All manifests name the version that this is."""
    version = re.search(r'^version = "([^"]+)"', Path("Cargo.toml").read_text(), re.MULTILINE)[1]
    for path in Path("manifests").rglob("*.yaml"):
        for tag in re.findall(r"\bpgsidecar:([0-9][\w.-]*)|newTag: (\S+)", path.read_text()):
            check("".join(tag) == version, f"{path}: version {''.join(tag)}, and this is {version}")


for rendered in ("base", "self-managed", "cert-manager", "monitoring"):
    schemas(RENDERED / f"{rendered}.yaml")
for example in sorted(Path("manifests/examples").glob("*.yaml")):
    schemas(example)
webhook(RENDERED / "self-managed.yaml", self_managed=True)
webhook(RENDERED / "cert-manager.yaml", self_managed=False)
monitoring(program_metrics())
images()
if errors:
    sys.exit("\n".join(f"error: {error}" for error in errors))
