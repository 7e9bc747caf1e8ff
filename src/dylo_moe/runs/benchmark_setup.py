"""What ``benchmark`` runs on: the model, the problems and the prompt style that the flags name."""

from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from dylo_moe.config import OWN_BASE, BenchmarkArgs, ModelArgs
from dylo_moe.core import DESCRIPTION_FILE, DTYPES, load_base_model, load_tokenizer, locate_base, read_description
from dylo_moe.data import AUTO, Row, read_rows, resolve, template_of, user_message
from dylo_moe.errors import ConfigError, EvaluationError
from dylo_moe.evaluation import COMPLETE, Model, Problem, PromptStyle, load_problems
from dylo_moe.runs.mixtures import load_mixture, to_device
from dylo_moe.training import fetch_mixture

_DEFAULT_MIXTURE = "./results/best_model"


_ARTIFACTS = Path("results") / "artifacts"


def load_model(args: BenchmarkArgs) -> tuple[Model, PreTrainedTokenizerBase, str]:
    """Load the mixture or base model that the flags name.

    Returns:
        The model, its tokenizer, and its name for the report.

    Raises:
        DyLoRAError: A part of it is missing or cannot be loaded.
    """
    if args.scores_mixture:
        folder = _mixture_folder(args)
        mixture, tokenizer = load_mixture(folder, args.base_model)
        return mixture, tokenizer, str(folder)
    assert args.base_model is not None
    name, revision = args.base_model, args.revision
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    if name == OWN_BASE:
        name = ModelArgs.model_name
        if args.trained_model is not None or args.wandb_artifact is not None:
            folder = _mixture_folder(args)
            entry = read_description(folder).base_model
            name, revision = locate_base(folder, entry)
            dtype = DTYPES[entry.dtype]
    base = load_base_model(name, revision=revision, dtype=dtype).eval()
    to_device(base)
    return base, load_tokenizer(name, revision=revision), name


def _mixture_folder(args: BenchmarkArgs) -> Path:
    """Return the folder of the mixture; an artifact is downloaded first."""
    if args.wandb_artifact is not None:
        return fetch_mixture(args.wandb_artifact, _ARTIFACTS)
    folder = Path(args.trained_model or _DEFAULT_MIXTURE)
    if args.trained_model is None and not (folder / DESCRIPTION_FILE).is_file():
        raise ConfigError(f"there is no mixture in {folder} yet: name one with --trained_model, or give --base_model")
    return folder


def style_of(choice: str, template: str | None, tokenizer: PreTrainedTokenizerBase) -> PromptStyle:
    """Return the style of the prompts for a model.

    Args:
        choice: ``auto``, ``complete``, ``chat`` or ``plain``.
        template: Name of the template that the model was trained with; None if unknown.
        tokenizer: The tokenizer of the model.

    Raises:
        ConfigError: ``choice`` is ``chat``, and the model has no chat template.
    """
    if choice == AUTO:
        choice = template or ("chat" if tokenizer.chat_template else COMPLETE)
    if choice == COMPLETE:
        return PromptStyle()
    if choice == "chat" and not tokenizer.chat_template:
        raise ConfigError("--prompt_style chat needs a model with a chat template, and this one has none")
    chosen = template_of(choice, tokenizer)
    return PromptStyle(choice, lambda instruction: chosen.render(user_message(instruction)))


def chosen_problems(args: BenchmarkArgs) -> dict[str, list[Problem]]:
    """Load the problems of each benchmark in ``--benchmarks``, by the benchmark's name.

    Raises:
        DyLoRAError: The data of a benchmark cannot be read, or holds no task.
    """
    rows: list[Row] | None = None
    if "mbpp" in (args.benchmarks or []) and not args.evalplus:
        rows = read_rows(resolve("mbpp", args.data_dir))
    chosen = {name: load_problems(name, args.evalplus, rows)[: args.max_samples] for name in args.benchmarks or []}
    for name, problems in chosen.items():
        if not problems:
            raise EvaluationError(f"--benchmarks {name}: its data holds no task to ask; check --data_dir")
    return chosen
