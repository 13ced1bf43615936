"""The parts of Kubernetes's and KubeRay's (ray.io/v1, 1.7) schemas that cluster/kubernetes uses.

Other fields are refused; Kubernetes itself would drop them silently.
"""

from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

Schema = dict[str, Any]


def closed(optional: str = "", **fields: Schema) -> Schema:
    """An object of exactly these fields, of which some may be missing."""
    required = [name for name in fields if name not in optional.split()]
    kind = {"type": "object", "additionalProperties": False}
    return {**kind, "properties": fields, "required": required}


def each(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def one_of(*values: str) -> Schema:
    return {"enum": values}


def integer(least: int, most: int | None = None) -> Schema:
    return {"type": "integer", "minimum": least, **({"maximum": most} if most else {})}


def text(pattern: str = "", **limits: int) -> Schema:
    return {"type": "string", "pattern": pattern, **limits}


BOOL, INT, TEXT = {"type": "boolean"}, {"type": "integer"}, text()
TEXTS = {"type": "object", "additionalProperties": TEXT}
NAME = text(r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", maxLength=63)
QUANTITY = text(r"^\d+(\.\d+)?(m|[KMGT]i?)?$")  # CPUs, bytes or GPUs
AMOUNTS = {"cpu": QUANTITY, "memory": QUANTITY, "nvidia.com/gpu": QUANTITY}
RESOURCES = closed(
    "limits",
    requests=closed(" ".join([*AMOUNTS, "storage"]), **AMOUNTS, storage=QUANTITY),
    limits=closed(" ".join(AMOUNTS), **AMOUNTS),
)
LABELS = closed("labels", labels=TEXTS)
METADATA = closed("labels", name=NAME, labels=TEXTS)

MOUNTS = each(closed("readOnly", name=NAME, mountPath=text("^/"), readOnly=BOOL))
CONTAINER_SECURITY = closed(
    allowPrivilegeEscalation=BOOL, readOnlyRootFilesystem=BOOL, capabilities=closed(drop=each(TEXT))
)
CONTAINER = closed(
    "env ports",
    name=NAME,
    image=TEXT,
    securityContext=CONTAINER_SECURITY,
    env=each(closed(name=TEXT, value=TEXT)),
    ports=each(closed(containerPort=integer(1, 65535), name=text("^[a-z0-9-]{1,15}$"))),
    resources=RESOURCES,
    volumeMounts=MOUNTS,
)
SOURCE = closed(
    "serviceAccountToken configMap downwardAPI",
    serviceAccountToken=closed(path=TEXT, expirationSeconds=integer(600)),
    configMap=closed(name=NAME, items=each(closed(key=TEXT, path=TEXT))),
    downwardAPI=closed(items=each(closed(path=TEXT, fieldRef=closed(fieldPath=TEXT)))),
)
VOLUME = closed(
    "persistentVolumeClaim emptyDir projected",
    name=NAME,
    persistentVolumeClaim=closed(claimName=NAME),
    emptyDir=closed("medium", medium=one_of("", "Memory"), sizeLimit=QUANTITY),
    projected=closed(sources=each(SOURCE)),
)
TOLERATION = closed(
    key=TEXT,
    operator=one_of("Exists", "Equal"),
    effect=one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
)
POD_SECURITY = closed(
    runAsNonRoot=BOOL,
    runAsUser=INT,
    runAsGroup=INT,
    fsGroup=INT,
    seccompProfile=closed(type=one_of("RuntimeDefault", "Localhost", "Unconfined")),
)
POD_SPEC = closed(
    "restartPolicy tolerations",
    restartPolicy=one_of("Always", "OnFailure", "Never"),
    automountServiceAccountToken=BOOL,
    securityContext=POD_SECURITY,
    tolerations=each(TOLERATION),
    containers=each(CONTAINER),
    volumes=each(VOLUME),
)
POD = closed(metadata=LABELS, spec=POD_SPEC)

HEAD_GROUP = closed(
    serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"), rayStartParams=TEXTS, template=POD
)
WORKER_GROUP = closed(
    groupName=TEXT,
    minReplicas=integer(0),
    maxReplicas=integer(0),
    rayStartParams=TEXTS,
    template=POD,
)
AUTOSCALER = closed(
    version=one_of("v1", "v2"),
    idleTimeoutSeconds=integer(1),
    securityContext=CONTAINER_SECURITY,
    volumeMounts=MOUNTS,
)
CLUSTER = closed(
    rayVersion=TEXT,
    authOptions=closed(mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=BOOL,
    autoscalerOptions=AUTOSCALER,
    headGroupSpec=HEAD_GROUP,
    workerGroupSpecs=each(WORKER_GROUP),
)
JOB = closed(
    entrypoint=TEXT,
    submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    backoffLimit=integer(0),
    shutdownAfterJobFinishes=BOOL,
    ttlSecondsAfterFinished=integer(0),
    rayClusterSpec=CLUSTER,
    submitterPodTemplate=POD,
)
CLAIM = closed(
    "storageClassName",
    accessModes=each(one_of("ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany")),
    storageClassName=TEXT,
    resources=RESOURCES,
)
SELECTOR = closed("matchLabels", matchLabels=TEXTS)
PEERS = each(
    closed(
        "podSelector namespaceSelector ipBlock",
        podSelector=SELECTOR,
        namespaceSelector=SELECTOR,
        ipBlock=closed(cidr=TEXT),
    )
)
PORTS = each(closed(protocol=one_of("TCP", "UDP"), port=INT))
POLICY = closed(
    podSelector=SELECTOR,
    policyTypes=each(one_of("Ingress", "Egress")),
    ingress=each(closed("ports", **{"from": PEERS}, ports=PORTS)),
    egress=each(closed("ports", to=PEERS, ports=PORTS)),
)
KINDS = {
    kind: Draft202012Validator(
        closed(apiVersion=one_of(version), kind=one_of(kind), metadata=METADATA, spec=spec)
    )
    for kind, version, spec in (
        ("RayCluster", "ray.io/v1", CLUSTER),
        ("RayJob", "ray.io/v1", JOB),
        ("PersistentVolumeClaim", "v1", CLAIM),
        ("NetworkPolicy", "networking.k8s.io/v1", POLICY),
    )
}
