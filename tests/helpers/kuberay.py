"""The parts of Kubernetes's and KubeRay's (ray.io/v1, 1.7) schemas that cluster/kubernetes uses.

Other fields are refused; Kubernetes itself would drop them silently.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Quantity = Annotated[str, StringConstraints(pattern=r"^\d+(\.\d+)?(m|[KMGT]i?)?$")]
"""CPUs, bytes or GPUs."""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=63)]


class Object(BaseModel):
    """A model of exactly these fields and types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Labels(Object):
    labels: dict[str, str] = {}


class Metadata(Labels):
    name: Name


class Resources(Object):
    requests: dict[Literal["cpu", "memory", "storage", "nvidia.com/gpu"], Quantity]
    limits: dict[Literal["cpu", "memory", "nvidia.com/gpu"], Quantity] | None = None


class Port(Object):
    containerPort: Annotated[int, Field(gt=0, lt=65536)]
    name: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,15}$")]


class Variable(Object):
    name: str
    value: str


class Mount(Object):
    name: Name
    mountPath: Annotated[str, StringConstraints(pattern=r"^/")]
    readOnly: bool = False


class Capabilities(Object):
    drop: list[str]


class ContainerSecurity(Object):
    allowPrivilegeEscalation: bool
    readOnlyRootFilesystem: bool
    capabilities: Capabilities


class SeccompProfile(Object):
    type: Literal["RuntimeDefault", "Localhost", "Unconfined"]


class PodSecurity(Object):
    runAsNonRoot: bool
    runAsUser: int
    runAsGroup: int
    fsGroup: int
    seccompProfile: SeccompProfile


class Container(Object):
    name: Name
    image: str
    securityContext: ContainerSecurity
    env: list[Variable] = []
    ports: list[Port] = []
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Object):
    claimName: Name


class EmptyDir(Object):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity


class Token(Object):
    path: str
    expirationSeconds: Annotated[int, Field(ge=600)]


class KeyToPath(Object):
    key: str
    path: str


class ConfigMap(Object):
    name: Name
    items: list[KeyToPath]


class FieldRef(Object):
    fieldPath: str


class DownwardFile(Object):
    path: str
    fieldRef: FieldRef


class DownwardAPI(Object):
    items: list[DownwardFile]


class Source(Object):
    serviceAccountToken: Token | None = None
    configMap: ConfigMap | None = None
    downwardAPI: DownwardAPI | None = None


class Projected(Object):
    sources: list[Source]


class Volume(Object):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None
    projected: Projected | None = None


class Toleration(Object):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Object):
    restartPolicy: Literal["Always", "OnFailure", "Never"] | None = None
    automountServiceAccountToken: bool
    securityContext: PodSecurity
    tolerations: list[Toleration] = []
    containers: list[Container]
    volumes: list[Volume]


class Pod(Object):
    metadata: Labels
    spec: PodSpec


class AuthOptions(Object):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(Object):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Annotated[int, Field(gt=0)]
    securityContext: ContainerSecurity
    volumeMounts: list[Mount]


class HeadGroup(Object):
    serviceType: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    rayStartParams: dict[str, str]
    template: Pod


class WorkerGroup(Object):
    groupName: str
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Annotated[int, Field(ge=0)]
    rayStartParams: dict[str, str]
    template: Pod


class ClusterSpec(Object):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class JobSpec(Object):
    entrypoint: str
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    backoffLimit: Annotated[int, Field(ge=0)]
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Annotated[int, Field(ge=0)]
    rayClusterSpec: ClusterSpec
    submitterPodTemplate: Pod


class RayCluster(Object):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: Metadata
    spec: ClusterSpec


class RayJob(Object):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: JobSpec


class ClaimSpec(Object):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"]]
    storageClassName: str | None = None
    resources: Resources


class PersistentVolumeClaim(Object):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: ClaimSpec


class Selector(Object):
    matchLabels: dict[str, str] = {}


class Block(Object):
    cidr: str


class Peer(Object):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None
    ipBlock: Block | None = None


class PolicyPort(Object):
    protocol: Literal["TCP", "UDP"]
    port: int


class Ingress(Object):
    from_: Annotated[list[Peer], Field(alias="from")]
    ports: list[PolicyPort] = []


class Egress(Object):
    to: list[Peer]
    ports: list[PolicyPort] = []


class PolicySpec(Object):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]
    egress: list[Egress]


class NetworkPolicy(Object):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: PolicySpec


KINDS: dict[str, type[Object]] = {
    kind.__name__: kind for kind in (RayCluster, RayJob, PersistentVolumeClaim, NetworkPolicy)
}
