"""``acquire``: a stream of skills, each learned by an expert of its own while the older ones stay as they are.

    OUTPUT_DIR/model            the mixture and its skills after the last skill that is done
    OUTPUT_DIR/stages/SKILL     training checkpoints of the one that is being learned

Interrupted anywhere, the same command goes on: skills in ``model`` are done, and a stage goes on from its newest whole
checkpoint.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedTokenizerBase, set_seed

from dylo_moe.config import ACQUIRE_GROUPS, AUTO_RESUME, AcquireFlags, DataArguments, TrainFlags
from dylo_moe.core.base_model import load_tokenizer
from dylo_moe.core.checkpoint import DESCRIPTION_FILE
from dylo_moe.core.model import DyLoRA_MoE
from dylo_moe.data.packing import TokenCollator, TokenRows
from dylo_moe.data.prepare_data import PreparedData
from dylo_moe.errors import ConfigError
from dylo_moe.flags import parse, to_yaml
from dylo_moe.programs.building import build_model, build_trainer, check_inputs, check_packing, prepare
from dylo_moe.programs.mixtures import to_device
from dylo_moe.programs.resuming import resume_folder
from dylo_moe.programs.train import runs_to_the_end
from dylo_moe.programs.trainer_arguments import trainer_arguments
from dylo_moe.reports.skill_tables import experts_table, loss_table, novelty_line, stream_metrics_line
from dylo_moe.skills.acquisition import SkillData, acquire_skill
from dylo_moe.skills.library import SkillEntry, SkillLibrary, save_with_skills
from dylo_moe.skills.lifecycle import list_experts
from dylo_moe.skills.ranks import rank_for
from dylo_moe.training import checkpoints
from dylo_moe.training.interruption import EXIT_STOPPED

MODEL, STAGES, REPORT_FILE = "model", "stages", "report.json"


def main(arguments: Sequence[str], program: str = "dylora-moe acquire") -> int:
    """Runs the program; returns its exit code.

    Raises:
        DyLoRAError: The user can mend it.
    """
    description = "Learn skills one after the other; the flags of train say how each is trained."
    own, *groups = parse(ACQUIRE_GROUPS, program, description, arguments)
    train = TrainFlags(*groups)
    if train.data.datasets != DataArguments.datasets:
        raise ConfigError(f"--datasets must be left out: --skills names what is learned, got {train.data.datasets!r}")
    names = ",".join(own.names)
    flags = AcquireFlags(own, train._replace(data=replace(train.data, datasets=names)))
    if train.run.dry_run:
        sys.stdout.write(to_yaml([own, *flags.train]))
        return 0
    return 0 if Stream(flags, Console()).run() else EXIT_STOPPED


class Stream:
    """A stream of skills, and the model that learns them.

    Args:
        flags: Of the program.
        console: To say what happens.

    Raises:
        DyLoRAError: The user can mend it.
    """

    def __init__(self, flags: AcquireFlags, console: Console) -> None:
        self.own, self.flags, self.console = flags.acquire, flags.train, console
        _check(self.flags)
        transformers.logging.disable_progress_bar()
        self.output = Path(self.flags.training.output_dir)
        self.folder = self.output / MODEL
        wanted = self.flags.model
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(wanted.model_name, revision=wanted.revision)
        self.model, self.library = self._model()

    def run(self) -> bool:
        """Learns what is not known yet; False where it was asked to stop, with all that is done on the disk."""
        for number, (name, wanted) in enumerate(zip(self.own.plain_names, self.own.names, strict=True)):
            if name in self.library.names:
                self._say(f"{name}: learned already")
            elif not self._acquire(number, name, wanted):
                return False
        self.console.print(experts_table(list_experts(self.folder), self.library), loss_table(self.library))
        if line := stream_metrics_line(self.library):
            self._say(line)
        self._write_report()
        self._say(f"Mixture and skills: {self.folder}")
        return True

    def _model(self) -> tuple[DyLoRA_MoE, SkillLibrary]:
        """What an earlier run has left, or a new model with one expert that no skill has claimed."""
        if (self.folder / DESCRIPTION_FILE).is_file():
            model = DyLoRA_MoE.from_pretrained(self.folder, self.flags.model.model_name)
            to_device(model)
            return model, SkillLibrary.load(self.folder, model.experts.names)
        set_seed(self.flags.training.seed)
        model = build_model(self.flags)
        rank = self._rank(model, self._rows(self.own.names[0]))
        if rank != self.flags.experts.lora_r:
            set_seed(self.flags.training.seed)
            model = build_model(self.flags._replace(experts=replace(self.flags.experts, lora_r=rank)))
        to_device(model)
        return model, SkillLibrary(model.router.hidden_size)

    def _acquire(self, number: int, name: str, wanted: str) -> bool:
        # the same whether the skills before were learned by this process or by another one
        set_seed(self.flags.training.seed + number)
        args, rows = self.flags.experts, self._rows(wanted)
        learned = acquire_skill(
            self.model,
            self.library,
            self._data(name, rows),
            lambda expert: self._train(name, wanted),
            extend=self.own.forced,
            measure=self.own.measure,
            on_judged=lambda report, expert: self._say(
                novelty_line(name, report, expert, _rank_of(self.model, expert))
            ),
            rank=self._rank(self.model, rows),
            alpha=args.lora_alpha,
            dropout=args.lora_dropout,
            target_modules=args.targets,
            use_rslora=args.use_rslora,
        )
        if learned is None:
            return False
        self._evaluate(learned.entry)
        save_with_skills(self.model, self.library, self.folder)
        for folder in checkpoints.newest_first(self._stage(name)):
            checkpoints.remove(folder)
        return True

    def _rank(self, model: DyLoRA_MoE, rows: PreparedData) -> int:
        """Of an expert that is made for a dataset."""
        largest = self.flags.experts.lora_r
        if not self.own.rank_from_data:
            return largest
        first = model.experts.names[0]
        per_rank = model.experts.num_parameters(first) / _rank_of(model, first)
        return rank_for(sum(summary.labelled_tokens for summary in rows.summaries), per_rank, largest)

    def _rows(self, wanted: str) -> PreparedData:
        """A dataset as single examples."""
        alone = replace(self.flags.data, datasets=wanted, packing=False)
        return prepare(alone, self.tokenizer, self.flags.training.seed)

    def _data(self, name: str, rows: PreparedData) -> SkillData:
        """Samples of single examples, chosen by the seed."""
        for note in rows.notes:
            self._say(note)
        self.model.prompt_template = rows.template.name
        return SkillData(name, self._sample(rows.train), self._sample(rows.validation), len(rows.train))

    def _sample(self, rows: TokenRows) -> list[dict[str, torch.Tensor]]:
        order = np.random.default_rng(self.flags.training.seed).permutation(len(rows))
        chosen: Subset[object] = Subset(rows, order[: self.own.sample_rows].tolist())
        collate = TokenCollator(self.tokenizer.pad_token_id)
        return list(DataLoader(chosen, batch_size=self.flags.training.eval_batch_size, collate_fn=collate))

    def _train(self, name: str, wanted: str) -> bool:
        training = replace(self.flags.training, output_dir=str(self._stage(name)), resume_from_checkpoint=AUTO_RESUME)
        flags = self.flags._replace(training=training, data=replace(self.flags.data, datasets=wanted))
        data = prepare(flags.data, self.tokenizer, training.seed)
        if flags.data.packing:
            check_packing(self.model, data, self.console)
        trainer = build_trainer(flags, self.model, self.tokenizer, data, trainer_arguments(flags))
        return runs_to_the_end(trainer, flags, resume_folder(flags, self.console), self.console)

    def _evaluate(self, entry: SkillEntry) -> None:
        """Held-out loss and routing of each skill that this command can read, with all experts routed."""
        known = [
            wanted
            for name, wanted in zip(self.own.plain_names, self.own.names, strict=True)
            if name in self.library.names
        ]
        unread = [name for name in self.library.names if name not in self.own.plain_names]
        if unread:
            self._say(f"Not evaluated, as --skills does not name them: {', '.join(unread)}")
        flags = self.flags._replace(
            data=replace(self.flags.data, datasets=",".join(known)),
            training=replace(self.flags.training, output_dir=str(self._stage(entry.name))),
        )
        data = prepare(flags.data, self.tokenizer, flags.training.seed)
        trainer = build_trainer(flags, self.model, self.tokenizer, data, trainer_arguments(flags))
        metrics = trainer.evaluate_apart("after")
        for name in data.domains:
            entry.losses[name] = metrics[f"after_loss/{name}"]
            usage = {expert: metrics[f"after_usage/{name}/{expert}"] for expert in self.model.experts.names}
            entry.usage[name] = usage
        self._say(f"{entry.name}: held-out loss {entry.losses[entry.name]:.3f} nats per token")

    def _write_report(self) -> None:
        """Write the held-out losses after each skill, and forgetting and backward transfer if they are known."""
        metrics = self.library.stream_metrics()
        report = {
            "losses": {skill.name: skill.losses for skill in self.library.skills},
            "forgetting": None if metrics is None else metrics.forgetting,
            "backward_transfer": None if metrics is None else metrics.backward_transfer,
        }
        (self.output / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")

    def _stage(self, name: str) -> Path:
        return self.output / STAGES / name

    def _say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)


def _rank_of(model: DyLoRA_MoE, expert: str) -> int:
    config: Any = model.experts.peft_model.peft_config[expert]
    rank: int = config.r
    return rank


def _check(flags: TrainFlags) -> None:
    check_inputs(flags)
    training = flags.training
    if training.resume_from_checkpoint not in (None, AUTO_RESUME, "latest"):
        raise ConfigError(
            "--resume_from_checkpoint must be left out: acquire always goes on from what is in --output_dir, "
            f"got {training.resume_from_checkpoint}"
        )
    if training.overwrite_output_dir:
        raise ConfigError("--overwrite_output_dir must be left out: acquire goes on; choose another --output_dir")
    if flags.model.bits is not None or flags.uses_wandb or flags.benchmark.benchmark_strategy != "none":
        raise ConfigError("acquire has no quantised base, no W&B and no benchmarks in between: leave their flags out")
    if training.save_in_place:  # killed while the mixture is copied, it would have lost the skills before
        raise ConfigError(
            "--save_in_place must be left out: acquire needs an --output_dir whose folders can be renamed"
        )
