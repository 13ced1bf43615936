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


class Metadata(Object):
    name: Name
    labels: dict[str, str] = {}


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


class Container(Object):
    name: Name
    image: str
    env: list[Variable] = []
    ports: list[Port] = []
    resources: Resources
    volumeMounts: list[Mount]


class Claim(Object):
    claimName: Name


class EmptyDir(Object):
    medium: Literal["", "Memory"] = ""
    sizeLimit: Quantity


class Volume(Object):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Toleration(Object):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(Object):
    tolerations: list[Toleration] = []
    containers: list[Container]
    volumes: list[Volume]


class Pod(Object):
    spec: PodSpec


class AuthOptions(Object):
    mode: Literal["token", "disabled"]


class AutoscalerOptions(Object):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Annotated[int, Field(gt=0)]


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


KINDS: dict[str, type[Object]] = {
    kind.__name__: kind for kind in (RayCluster, RayJob, PersistentVolumeClaim)
}
