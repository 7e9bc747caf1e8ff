"""What the commands share: setting up, running and resuming a training run or a benchmark."""

from dylo_moe.runs.benchmark_setup import chosen_problems, load_model, style_of
from dylo_moe.runs.composition import RouteSamples, finetune_router, read_route_samples
from dylo_moe.runs.distillation import distill
from dylo_moe.runs.live_benchmark import LiveBenchmark
from dylo_moe.runs.mixtures import load_mixture, to_device
from dylo_moe.runs.output_folder import check_writable
from dylo_moe.runs.resume import resume_folder
from dylo_moe.runs.teaching import teach
from dylo_moe.runs.trainer_arguments import make_trainer_arguments
from dylo_moe.runs.training_loop import run_training
from dylo_moe.runs.training_setup import (
    build_model,
    build_trainer,
    check_inputs,
    check_packing,
    first_batches,
    prepare,
)

__all__ = [
    "LiveBenchmark",
    "RouteSamples",
    "build_model",
    "build_trainer",
    "check_inputs",
    "check_packing",
    "check_writable",
    "chosen_problems",
    "distill",
    "finetune_router",
    "first_batches",
    "load_mixture",
    "load_model",
    "make_trainer_arguments",
    "prepare",
    "read_route_samples",
    "resume_folder",
    "run_training",
    "style_of",
    "teach",
    "to_device",
]
