"""``submit``: a training run as a custom job of Vertex AI, on spot machines."""

import json
import os
import sys
from collections.abc import Sequence

from dylo_moe.cloud.settings import resolve
from dylo_moe.cloud.vertex import connect, create_request, machine_hours, send, watch
from dylo_moe.cloud_config import SubmitArgs
from dylo_moe.config import TrainConfig
from dylo_moe.flags import parse

FULL_TRAINING = (
    "--datasets=code_alpaca,evol_instruct,code_feedback,mbpp",
    "--bf16",
    "--num_epochs=3",
    "--num_experts=4",
    "--save_minutes=15",
)
"""What the job trains where nothing follows ``--``."""


def main(arguments: Sequence[str], program: str = "dylora-moe submit") -> int:
    """Runs the program; returns its exit code.

    Raises:
        DyLoRAError: The user can mend it.
    """
    given, training = _split(arguments)
    description = "Train on Vertex AI. What follows -- are flags of train; without any: " + " ".join(FULL_TRAINING)
    args = parse(SubmitArgs, program, description, given)
    parse(TrainConfig, f"{program} --", "", training)  # a mistake costs seconds here, and an hour there
    settings = resolve(args, os.environ)
    request = create_request(args, settings, training)
    if args.dry_run:
        sys.stdout.write(json.dumps(request, indent=2) + "\n")
        return 0
    client = connect(settings.region)
    name = send(request, client)
    _say(f"Created {name}")
    _say(
        f"https://console.cloud.google.com/vertex-ai/locations/{settings.region}/training/{name.rpartition('/')[2]}"
        f"?project={settings.project}"
    )
    _say(
        f"{args.replicas} x {args.machine_type} for at most {args.timeout_hours:g} hours: "
        f"at most {machine_hours(args):g} machine-hours"
    )
    if not args.watch:
        return 0
    succeeded, hours = watch(name, client, _say)
    _say(f"Took {args.replicas * hours:.2f} machine-hours of {args.machine_type}")
    return 0 if succeeded else 1


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of the job, and those of ``train``, which come after ``--``."""
    arguments = list(arguments)
    if "--" not in arguments:
        return arguments, list(FULL_TRAINING)
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :] or list(FULL_TRAINING)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
