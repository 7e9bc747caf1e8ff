"""What this process runs on, read from the environment alone, and what that changes.

Vertex AI says where to write (``AIP_...``), who the other workers are (``CLUSTER_SPEC``), and mounts Cloud Storage
below ``/gcs``. Vast.ai rents out a share of a machine, but its containers see all cores and little shared memory.
Nothing here imports torch: the settings have to stand in the environment before that reads them.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dylo_moe.errors import CloudError

VERTEX, VAST, DOCKER, BARE = "Vertex AI", "Vast.ai", "a container", "this machine"
SMALL_SHARED_MEMORY = 1 << 30
"""Bytes of ``/dev/shm`` below which NCCL is kept from it: eight ranks want some hundred MiB, Docker gives 64."""


@dataclass(frozen=True)
class Cluster:
    """The machines of one job.

    Attributes:
        machines: How many there are.
        rank: Which one this is, from 0.
        address: Host name of the first one.
        port: Where the first one listens.
    """

    machines: int
    rank: int
    address: str
    port: int

    def launch_arguments(self, processes: int) -> list[str]:
        """The arguments of ``torchrun`` on this machine, for so many processes on each one."""
        return [
            f"--nnodes={self.machines}",
            f"--node-rank={self.rank}",
            f"--nproc-per-node={processes}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
        ]


@dataclass(frozen=True)
class Platform:
    """Where a process runs.

    Attributes:
        name: ``VERTEX``, ``VAST``, ``DOCKER`` or ``BARE``.
        job: What the platform calls the job or the machine; None where it has no name for it.
        checkpoint_dir: Where checkpoints go and come from; None for where the flags say.
        model_dir: Where the finished mixture is put as well.
        tensorboard_dir: Where TensorBoard's events go; None for the output folder.
        cluster: The machines of the job; None for one machine.
        settings: Environment variables to set, where they are not set yet.
        cores: Cores that are ours, where the operating system shows more; None where it shows the truth.
        buckets: Where object storage is mounted; folders below cannot be renamed.
    """

    name: str
    job: str | None = None
    checkpoint_dir: Path | None = None
    model_dir: Path | None = None
    tensorboard_dir: Path | None = None
    cluster: Cluster | None = None
    settings: dict[str, str] = field(default_factory=dict)
    cores: int | None = None
    buckets: tuple[Path, ...] = ()

    def is_bucket(self, folder: Path) -> bool:
        """Whether a folder is on object storage."""
        return any(folder.is_relative_to(bucket) for bucket in self.buckets)

    def describe(self) -> list[str]:
        """What was found and what it changes, in lines."""
        lines = [f"Running on {self.name}" + (f", {self.job}" if self.job else "")]
        places = {"Checkpoints": self.checkpoint_dir, "Model": self.model_dir, "TensorBoard": self.tensorboard_dir}
        lines += [f"{what}: {folder}" for what, folder in places.items() if folder is not None]
        if self.cluster is not None:
            lines.append(
                f"Machine {self.cluster.rank + 1} of {self.cluster.machines}; the first: {self.cluster.address}"
            )
        return lines + [f"Set {name}={value}" for name, value in self.settings.items()]


def detect(environment: Mapping[str, str], root: Path = Path("/")) -> Platform:
    """Tells the platform.

    Args:
        environment: The process's.
        root: The file system's root; tests have another one.

    Raises:
        CloudError: A variable of the platform's cannot be understood.
    """
    if environment.get("CLOUD_ML_JOB_ID"):
        checkpoint_dir = _folder(environment, "AIP_CHECKPOINT_DIR", root)
        return Platform(
            VERTEX,
            job=f"job {environment['CLOUD_ML_JOB_ID']}",
            checkpoint_dir=checkpoint_dir,
            model_dir=_folder(environment, "AIP_MODEL_DIR", root),
            tensorboard_dir=_folder(environment, "AIP_TENSORBOARD_LOG_DIR", root),
            cluster=_cluster(environment.get("CLUSTER_SPEC", "")),
            buckets=(root / "gcs", *([checkpoint_dir] if checkpoint_dir else [])),
        )
    vast = environment.get("VAST_CONTAINERLABEL") or environment.get("CONTAINER_ID")
    if vast:
        cores = _own_cores(root)
        return Platform(VAST, job=f"instance {vast}", settings=_on_a_share(environment, root, cores), cores=cores)
    marked = any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv"))
    if marked or environment.get("KUBERNETES_SERVICE_HOST"):
        return Platform(DOCKER, job=environment.get("HOSTNAME"))
    return Platform(BARE)


def local_folder(name: str, value: str, root: Path = Path("/")) -> Path:
    """A folder that a variable names, as a path: ``gs://bucket/x`` is mounted at ``/gcs/bucket/x``.

    Raises:
        CloudError: It is no such name, or the bucket is not mounted.
    """
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    if scheme != "gs" or not rest.strip("/"):
        raise CloudError(f"{name} must be a folder or gs://BUCKET/FOLDER, got {value!r}")
    if not (root / "gcs").is_dir():
        raise CloudError(
            f"{name} is {value}, and {root / 'gcs'} is not mounted; mount the bucket with Cloud Storage FUSE"
        )
    return root / "gcs" / rest.strip("/")


def _folder(environment: Mapping[str, str], name: str, root: Path) -> Path | None:
    value = environment.get(name)
    return local_folder(name, value, root) if value else None


def _cluster(spec: str) -> Cluster | None:
    """The machines in ``CLUSTER_SPEC``: those of ``workerpool0``, then ``workerpool1``, and so on.

    Its form: https://cloud.google.com/vertex-ai/docs/training/distributed-training#cluster-variables
    """
    if not spec:
        return None
    try:
        read = json.loads(spec)
        pools, task = read["cluster"], read["task"]
        machines = [(pool, index) for pool in sorted(pools) for index in range(len(pools[pool]))]
        rank = machines.index((task["type"], int(task["index"])))
        first = machines[0]
        address, _, port = pools[first[0]][first[1]].rpartition(":")
        cluster = Cluster(len(machines), rank, address, int(port))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CloudError(
            f"CLUSTER_SPEC must be JSON with the machines in 'cluster' and this one in 'task', got {spec[:200]!r}"
        ) from error
    return cluster if cluster.machines > 1 else None


def _own_cores(root: Path) -> int:
    """The cores that the control group grants; all that are visible where it grants as much as there is."""
    visible = len(os.sched_getaffinity(0))
    file = root / "sys/fs/cgroup/cpu.max"  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
    quota, _, period = file.read_text().strip().partition(" ") if file.is_file() else ("max", "", "")
    return visible if quota == "max" else max(1, min(visible, math.floor(int(quota) / int(period))))


def _on_a_share(environment: Mapping[str, str], root: Path, cores: int) -> dict[str, str]:
    """Threads for the cores that are ours, and NCCL without shared memory where there is too little of it."""
    settings = {"OMP_NUM_THREADS": str(cores)}
    shared = root / "dev/shm"
    if shared.is_dir():
        status = os.statvfs(shared)
        if status.f_frsize * status.f_blocks < SMALL_SHARED_MEMORY:
            settings["NCCL_SHM_DISABLE"] = "1"
    return {name: value for name, value in settings.items() if name not in environment}
