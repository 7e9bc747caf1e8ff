"""``acquire``: learn a stream of skills, each with an expert of its own; older experts do not change.

    OUTPUT_DIR/model            the mixture and its skills, saved after each finished skill
    OUTPUT_DIR/report.json      held-out losses, forgetting and backward transfer
    OUTPUT_DIR/stages/SKILL     training checkpoints of the skill that is being learned

After an interruption the same command resumes: skills in ``model`` are done, and the current skill resumes from its
newest complete checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import transformers
from peft import LoraConfig
from rich.console import Console
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase, set_seed

from dylo_moe.config import AUTO_RESUME, AcquireConfig, DataArgs, TrainConfig, parse, to_yaml
from dylo_moe.core import DESCRIPTION_FILE, DyLoRA_MoE, load_tokenizer
from dylo_moe.data import PreparedData, TokenCollator, TokenRows
from dylo_moe.durable import atomic_file
from dylo_moe.errors import EXIT_STOPPED, ConfigError
from dylo_moe.reports import experts_table, loss_table, novelty_line, stream_metrics_line
from dylo_moe.runs import (
    build_model,
    build_trainer,
    check_inputs,
    check_packing,
    make_trainer_arguments,
    prepare,
    resume_folder,
    run_training,
    to_device,
)
from dylo_moe.skills import (
    SkillData,
    SkillLibrary,
    SkillRecord,
    acquire_skill,
    list_experts,
    rank_for,
    save_with_skills,
)
from dylo_moe.training import checkpoints

MODEL, STAGES, REPORT_FILE = "model", "stages", "report.json"


def main(arguments: Sequence[str], program: str = "dylora-moe acquire") -> int:
    """Run the program and return its exit code.

    Raises:
        DyLoRAError: The user can fix it.
    """
    description = "Learn skills one after another; each is trained as the flags of train say."
    config = parse(AcquireConfig, program, description, arguments)
    own, train = config.acquire, config.train
    if train.data.datasets != DataArgs.datasets:
        raise ConfigError(f"--datasets must be left out: --skills names the data, got {train.data.datasets!r}")
    names = ",".join(own.names)
    flags = AcquireConfig(own, replace(train, data=replace(train.data, datasets=names)))
    if train.run.dry_run:
        sys.stdout.write(to_yaml(config))
        return 0
    return 0 if SkillStream(flags, Console()).run() else EXIT_STOPPED


class SkillStream:
    """A stream of skills, and the model that learns them.

    Args:
        flags: The flags of the program.
        console: Receives the progress messages.

    Raises:
        DyLoRAError: The user can fix it.
    """

    def __init__(self, flags: AcquireConfig, console: Console) -> None:
        self.own, self.flags, self.console = flags.acquire, flags.train, console
        _check(self.flags)
        transformers.logging.disable_progress_bar()
        self.output = Path(self.flags.training.output_dir)
        self.folder = self.output / MODEL
        base = self.flags.model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(base.model_name, revision=base.revision)
        self.model, self.library = self._load_or_build_model()

    def run(self) -> bool:
        """Learn the skills that are still missing; return False if a signal stopped it.

        Finished skills are on disk either way.
        """
        for number, (name, dataset) in enumerate(zip(self.own.plain_names, self.own.names, strict=True)):
            if name in self.library.names:
                self._print(f"{name}: learned already")
            elif not self._acquire(number, name, dataset):
                return False
        self.console.print(experts_table(list_experts(self.folder), self.library), loss_table(self.library))
        if line := stream_metrics_line(self.library):
            self._print(line)
        self._write_report()
        self._print(f"Mixture and skills: {self.folder}")
        return True

    def _load_or_build_model(self) -> tuple[DyLoRA_MoE, SkillLibrary]:
        """Return the model and skills of an earlier run, or a new model whose one expert has no skill yet."""
        if (self.folder / DESCRIPTION_FILE).is_file():
            model = DyLoRA_MoE.from_pretrained(self.folder, self.flags.model.model_name)
            to_device(model)
            return model, SkillLibrary.load(self.folder, model.experts.names)
        set_seed(self.flags.training.seed)
        model = build_model(self.flags)
        rank = self._rank_for(model, self._read_examples(self.own.names[0]))
        if rank != self.flags.experts.lora_r:
            set_seed(self.flags.training.seed)
            model = build_model(replace(self.flags, experts=replace(self.flags.experts, lora_r=rank)))
        to_device(model)
        return model, SkillLibrary(model.router.hidden_size)

    def _acquire(self, number: int, name: str, dataset: str) -> bool:
        # one seed per skill, so that a resumed stream draws the same numbers
        set_seed(self.flags.training.seed + number)
        args, rows = self.flags.experts, self._read_examples(dataset)
        for note in rows.notes:
            self._print(note)
        self.model.prompt_template = rows.template.name
        learned = acquire_skill(
            self.model,
            self.library,
            SkillData(name, self._sample(rows.train), self._sample(rows.validation), len(rows.train)),
            lambda expert: self._train(name, dataset),
            extend=self.own.forced,
            measure=self.own.measure,
            on_judged=lambda report, expert: self._print(
                novelty_line(name, report, expert, _rank_of(self.model, expert))
            ),
            rank=self._rank_for(self.model, rows),
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=args.targets,
            use_rslora=args.use_rslora,
        )
        if learned is None:
            return False
        self._evaluate(learned.entry)
        save_with_skills(self.model, self.library, self.folder)
        for folder in checkpoints.newest_first(self._stage_folder(name)):
            checkpoints.remove(folder)
        return True

    def _rank_for(self, model: DyLoRA_MoE, rows: PreparedData) -> int:
        """Return the rank of a new expert for a dataset: ``--lora_r``, or less with ``--rank_from_data``."""
        largest = self.flags.experts.lora_r
        if not self.own.rank_from_data:
            return largest
        first = model.experts.names[0]
        per_rank = model.experts.num_parameters(first) / _rank_of(model, first)
        return rank_for(sum(summary.labelled_tokens for summary in rows.summaries), per_rank, largest)

    def _read_examples(self, dataset: str) -> PreparedData:
        """Return a dataset as single examples, not packed."""
        args = replace(self.flags.data, datasets=dataset, packing=False)
        return prepare(args, self.tokenizer, self.flags.training.seed)

    def _sample(self, rows: TokenRows) -> list[dict[str, torch.Tensor]]:
        order = np.random.default_rng(self.flags.training.seed).permutation(len(rows))
        chosen: Subset[object] = Subset(rows, order[: self.own.sample_rows].tolist())
        collate = TokenCollator(self.tokenizer.pad_token_id)
        return list(DataLoader(chosen, batch_size=self.flags.training.eval_batch_size, collate_fn=collate))

    def _train(self, name: str, dataset: str) -> bool:
        output = str(self._stage_folder(name))
        training = replace(self.flags.training, output_dir=output, resume_from_checkpoint=AUTO_RESUME)
        flags = replace(self.flags, training=training, data=replace(self.flags.data, datasets=dataset))
        data = prepare(flags.data, self.tokenizer, training.seed)
        if flags.data.packing:
            check_packing(self.model, data, self.console)
        trainer = build_trainer(flags, self.model, self.tokenizer, data, make_trainer_arguments(flags))
        return run_training(trainer, flags, resume_folder(flags, self.console), self.console)

    def _evaluate(self, entry: SkillRecord) -> None:
        """Record the held-out loss and expert usage of every learned skill that ``--skills`` names.

        All experts are routed.
        """
        known = [
            dataset
            for name, dataset in zip(self.own.plain_names, self.own.names, strict=True)
            if name in self.library.names
        ]
        unread = [name for name in self.library.names if name not in self.own.plain_names]
        if unread:
            self._print(f"Not evaluated, as --skills does not name them: {', '.join(unread)}")
        flags = replace(
            self.flags,
            data=replace(self.flags.data, datasets=",".join(known)),
            training=replace(self.flags.training, output_dir=str(self._stage_folder(entry.name))),
        )
        data = prepare(flags.data, self.tokenizer, flags.training.seed)
        trainer = build_trainer(flags, self.model, self.tokenizer, data, make_trainer_arguments(flags))
        metrics = trainer.evaluate_without_logging("after")
        for name in data.domains:
            entry.losses[name] = metrics[f"after_loss/{name}"]
            entry.usage[name] = {expert: metrics[f"after_usage/{name}/{expert}"] for expert in self.model.experts.names}
        self._print(f"{entry.name}: held-out loss {entry.losses[entry.name]:.3f} nats per token")

    def _write_report(self) -> None:
        """Write the held-out losses after each skill, and forgetting and backward transfer if they are known."""
        metrics = self.library.stream_metrics()
        report = {
            "losses": {skill.name: skill.losses for skill in self.library.skills},
            "forgetting": None if metrics is None else metrics.forgetting,
            "backward_transfer": None if metrics is None else metrics.backward_transfer,
        }
        with atomic_file(self.output / REPORT_FILE) as file:
            file.write(json.dumps(report, indent=2) + "\n")

    def _stage_folder(self, name: str) -> Path:
        return self.output / STAGES / name

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _rank_of(model: DyLoRA_MoE, expert: str) -> int:
    config = model.experts.peft_model.peft_config[expert]
    assert isinstance(config, LoraConfig)
    return config.r


def _check(flags: TrainConfig) -> None:
    """Refuse the flags of ``train`` that a stream of skills cannot use.

    Raises:
        ConfigError: One of them is given.
    """
    check_inputs(flags)
    training = flags.training
    if training.resume_from_checkpoint not in (None, AUTO_RESUME, "latest"):
        raise ConfigError(
            "--resume_from_checkpoint must be left out: acquire always resumes from --output_dir, "
            f"got {training.resume_from_checkpoint}"
        )
    if training.overwrite_output_dir:
        raise ConfigError("--overwrite_output_dir must be left out: acquire resumes; choose another --output_dir")
    if flags.model.bits is not None or flags.uses_wandb or flags.benchmark.benchmark_strategy != "none":
        raise ConfigError("acquire supports no quantized base, no W&B and no benchmarks: leave their flags out")
    if training.save_in_place:  # killed while copying the mixture, it would lose the earlier skills
        raise ConfigError(
            "--save_in_place must be left out: acquire needs an --output_dir whose folders can be renamed"
        )
