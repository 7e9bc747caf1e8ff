"""Detection of the platform that this process runs on, from the environment, and what to change there.

Vertex AI says where to write (``AIP_...``), lists the other workers (``CLUSTER_SPEC``), and mounts Cloud Storage below
``/gcs``. Vast.ai rents out a share of a machine, but its containers see all cores and little shared memory.
Nothing here imports torch, which reads the environment variables that are set here when it is imported.
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
"""Size of ``/dev/shm`` in bytes below which NCCL must not use it: eight ranks need a few hundred MiB, Docker has 64."""


@dataclass(frozen=True)
class Cluster:
    """Machines of one job.

    Attributes:
        machines: Number of machines.
        rank: Index of this machine, from 0.
        address: Host name of the first machine.
        port: Port of the first machine.
    """

    machines: int
    rank: int
    address: str
    port: int

    def launch_arguments(self, processes: int) -> list[str]:
        """Return the arguments of ``torchrun`` on this machine, for this number of processes on each machine."""
        return [
            f"--nnodes={self.machines}",
            f"--node-rank={self.rank}",
            f"--nproc-per-node={processes}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
        ]


@dataclass(frozen=True)
class Platform:
    """Platform that a process runs on.

    Attributes:
        name: ``VERTEX``, ``VAST``, ``DOCKER`` or ``BARE``.
        job: The platform's name for the job or machine; None if it has none.
        checkpoint_dir: Folder of checkpoints; None for the one in the flags.
        model_dir: Folder for a copy of the finished mixture; None for no copy.
        tensorboard_dir: Folder of TensorBoard's events; None for the output folder.
        cluster: Machines of the job; None if there is only one.
        settings: Environment variables to set; none of them is set already.
        cores: Number of cores that may be used, if the operating system shows more; otherwise None.
        buckets: Mount points of object storage; folders below them cannot be renamed.
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
        """Return whether a folder is on object storage."""
        return any(folder.is_relative_to(bucket) for bucket in self.buckets)

    def describe(self) -> list[str]:
        """Return lines of text that describe the platform and its effects."""
        lines = [f"Running on {self.name}" + (f", {self.job}" if self.job else "")]
        folders = {"Checkpoints": self.checkpoint_dir, "Model": self.model_dir, "TensorBoard": self.tensorboard_dir}
        lines += [f"{label}: {folder}" for label, folder in folders.items() if folder is not None]
        if self.cluster is not None:
            lines.append(
                f"Machine {self.cluster.rank + 1} of {self.cluster.machines}; the first: {self.cluster.address}"
            )
        return lines + [f"Set {name}={value}" for name, value in self.settings.items()]


def detect(environment: Mapping[str, str], root: Path = Path("/")) -> Platform:
    """Return the platform that this process runs on.

    Args:
        environment: Environment variables of the process.
        root: Root of the file system; tests pass another one.

    Raises:
        CloudError: A variable set by the platform is malformed.
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
    vast_instance = environment.get("VAST_CONTAINERLABEL") or environment.get("CONTAINER_ID")
    if vast_instance:
        return _vast(f"instance {vast_instance}", environment, root)
    is_container = any((root / mark).exists() for mark in (".dockerenv", "run/.containerenv"))
    if is_container or environment.get("KUBERNETES_SERVICE_HOST"):
        return Platform(DOCKER, job=environment.get("HOSTNAME"))
    return Platform(BARE)


def local_folder(name: str, value: str, root: Path = Path("/")) -> Path:
    """Return the path of a folder; ``gs://bucket/x`` is mounted at ``/gcs/bucket/x``.

    Args:
        name: Name of the environment variable, for the error message.
        value: A folder or ``gs://BUCKET/FOLDER``.
        root: Root of the file system; tests pass another one.

    Raises:
        CloudError: The value is neither, or the bucket is not mounted.
    """
    scheme, separator, rest = value.partition("://")
    if not separator:
        return Path(value)
    if scheme != "gs" or not rest.strip("/"):
        raise CloudError(f"{name} must be a folder or gs://BUCKET/FOLDER, got {value!r}")
    if not (root / "gcs").is_dir():
        raise CloudError(
            f"{name} is {value}, but {root / 'gcs'} is not mounted; mount the bucket with Cloud Storage FUSE"
        )
    return root / "gcs" / rest.strip("/")


def _folder(environment: Mapping[str, str], name: str, root: Path) -> Path | None:
    value = environment.get(name)
    return local_folder(name, value, root) if value else None


def _cluster(spec: str) -> Cluster | None:
    """Return the machines in ``CLUSTER_SPEC``, by worker pool; None if there is only one.

    Its format: https://cloud.google.com/vertex-ai/docs/training/distributed-training#cluster-variables
    """
    if not spec:
        return None
    try:
        parsed = json.loads(spec)
        pools, task = parsed["cluster"], parsed["task"]
        machines = [(pool, index) for pool in sorted(pools) for index in range(len(pools[pool]))]
        rank = machines.index((task["type"], int(task["index"])))
        first_pool, first_index = machines[0]
        address, _, port = pools[first_pool][first_index].rpartition(":")
        cluster = Cluster(len(machines), rank, address, int(port))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise CloudError(
            f"CLUSTER_SPEC must be JSON with the machines in 'cluster' and this one in 'task', got {spec[:200]!r}"
        ) from error
    return cluster if cluster.machines > 1 else None


def _vast(job: str, environment: Mapping[str, str], root: Path) -> Platform:
    """Return a share of a machine: as many threads as it may use cores, and NCCL off shared memory if there is little.

    The usable cores are those that the control group grants, or all visible ones if it sets no limit.
    """
    visible = len(os.sched_getaffinity(0))
    file = root / "sys/fs/cgroup/cpu.max"  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
    quota, _, period = file.read_text().strip().partition(" ") if file.is_file() else ("max", "", "")
    cores = visible if quota == "max" else max(1, min(visible, math.floor(int(quota) / int(period))))
    settings = {"OMP_NUM_THREADS": str(cores)}
    shared_memory = root / "dev/shm"
    if shared_memory.is_dir():
        status = os.statvfs(shared_memory)
        if status.f_frsize * status.f_blocks < SMALL_SHARED_MEMORY:
            settings["NCCL_SHM_DISABLE"] = "1"
    missing = {name: value for name, value in settings.items() if name not in environment}
    return Platform(VAST, job=job, settings=missing, cores=cores)
