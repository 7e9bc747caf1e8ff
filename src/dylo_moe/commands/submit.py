"""``submit``: start a training run as a custom job on Vertex AI, on spot machines."""

import json
import os
import sys
from collections.abc import Sequence

from dylo_moe.cloud import JobSpec, connect, create_request, resolve, send, watch
from dylo_moe.config import SubmitArgs, TrainConfig, parse

_FULL_TRAINING = (
    "--datasets=code_alpaca,evol_instruct,code_feedback,mbpp",
    "--bf16",
    "--num_epochs=3",
    "--num_experts=4",
    "--save_minutes=15",
)
"""Flags of ``train`` that the job gets if nothing follows ``--``."""


def main(arguments: Sequence[str], program: str = "dylora-moe submit") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    given, training = _split(arguments)
    description = "Train on Vertex AI. Flags after -- are those of train; by default: " + " ".join(_FULL_TRAINING)
    args = parse(SubmitArgs, program, description, given)
    parse(TrainConfig, f"{program} --", "", training)  # a mistake costs seconds here, and an hour there
    settings = resolve(os.environ, project=args.project, region=args.region, bucket=args.bucket, image=args.image)
    job = _job_spec(args)
    request = create_request(job, settings, training)
    if args.dry_run:
        sys.stdout.write(json.dumps(request, indent=2) + "\n")
        return 0
    client = connect(settings.region)
    name = send(request, client)
    _print(f"Created {name}")
    _print(
        f"https://console.cloud.google.com/vertex-ai/locations/{settings.region}/training/{name.rpartition('/')[2]}"
        f"?project={settings.project}"
    )
    _print(
        f"{args.replicas} x {args.machine_type} for at most {args.timeout_hours:g} hours: "
        f"at most {job.machine_hours:g} machine-hours"
    )
    if not args.watch:
        return 0
    succeeded, hours = watch(name, client, _print)
    _print(f"Took {args.replicas * hours:.2f} machine-hours of {args.machine_type}")
    return 0 if succeeded else 1


def _job_spec(args: SubmitArgs) -> JobSpec:
    """Return the description of the job that the flags ask for."""
    return JobSpec(
        name=args.job_name,
        machine_type=args.machine_type,
        accelerator_type=args.gpu,
        replicas=args.replicas,
        spot=args.spot,
        timeout_hours=args.timeout_hours,
        disk_gb=args.disk_gb,
        service_account=args.service_account,
        labels=_pairs(args.labels),
        env=_pairs(args.env),
        secrets=_pairs(args.secrets),
    )


def _pairs(entries: Sequence[str] | None) -> dict[str, str]:
    """Return the names and values of ``NAME=VALUE`` entries."""
    return {name: value for name, _, value in (entry.partition("=") for entry in entries or [])}


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments at ``--`` into the flags of the job and those of ``train``."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, list(_FULL_TRAINING)
    separator = arguments.index("--")
    return arguments[:separator], arguments[separator + 1 :] or list(_FULL_TRAINING)


def _print(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
