"""Flags, files and defaults: one dataclass field is all of them."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dylo_moe import DyLoRA_MoE, cli
from dylo_moe.config.commands import (
    COMMANDS,
    LATEST,
    AcquireConfig,
    BenchmarkArgs,
    GenerateArgs,
    SubmitArgs,
    TrainConfig,
)
from dylo_moe.config.parser import Limits, parse, to_yaml, with_flags
from dylo_moe.config.trainer_fields import REFUSED
from dylo_moe.errors import EXIT_USER_ERROR, ConfigError, DyLoRAError
from tests.support.tiny_folder import write_tiny_folder


def parse_train(*arguments: str) -> dict[str, Any]:
    config = parse(TrainConfig, "train", "", arguments)
    return {key: value for group in vars(config).values() for key, value in vars(group).items()}


def passed_on(*arguments: str) -> dict[str, Any]:
    """The fields of TrainingArguments that are passed on."""
    return parse(TrainConfig, "train", "", arguments).passthrough.given


def test_defaults_are_the_ones_people_know() -> None:
    flags = parse_train()
    assert flags["model_name"] == "google/codegemma-2b"
    assert flags["datasets"] == "code_alpaca,mbpp"
    assert (flags["num_experts"], flags["lora_r"], flags["top_k"]) == (4, 16, 2)
    assert (flags["train_batch_size"], flags["gradient_accumulation_steps"]) == (2, 32)
    assert flags["balance_coefficient"] == 0.01
    assert flags["resume_from_checkpoint"] is None


@pytest.mark.parametrize(
    "command",
    [
        "--bf16 --num_epochs 10 --num_experts 4",
        "--training_subset 10 --eval_subset 20 --num_epochs 3",
        "--datasets code_alpaca,evol_instruct,code_feedback,mbpp --bf16",
        "--resume_from_checkpoint",
        "--interleaved_sampling --balance_coefficient 0.01 --cosine_restarts --train_batch_size 2 "
        "--gradient_accumulation_steps 32",
    ],
)
def test_the_commands_of_the_readme_parse_with_both_spellings(command: str) -> None:
    underscored = parse_train(*command.split())
    hyphened = parse_train(*(word.replace("_", "-") if word.startswith("--") else word for word in command.split()))
    assert underscored == hyphened
    assert underscored != parse_train()


def test_resume_takes_a_folder_or_none() -> None:
    assert parse_train("--resume_from_checkpoint")["resume_from_checkpoint"] == LATEST
    assert parse_train("--resume_from_checkpoint", "a/b")["resume_from_checkpoint"] == "a/b"


def test_the_fields_names_in_the_field_are_aliases() -> None:
    assert parse_train("--per_device_train_batch_size", "3")["train_batch_size"] == 3
    assert parse_train("--router-aux-loss-coef", "0.5")["balance_coefficient"] == 0.5


def test_one_expert_needs_no_top_k() -> None:
    assert parse_train("--num_experts", "1")["top_k"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_expert", "2"], "unknown argument '--num_expert'; did you mean '--num_experts'"),
        (["--num_experts", "many"], "invalid int value: 'many'"),
        (["--num_experts", "2", "--top_k", "3"], r"--top_k must be from 1 to the number of experts \(2\), got 3"),
        (["--lora_r", "-4"], "--lora_r must be at least 1, got -4"),
        (["--lora_dropout", "1"], "--lora_dropout must be from 0"),
        (["--router_temperature", "0"], "--router_temperature must be above 0"),
        (["--balance_coefficient", "-1"], "--balance_coefficient must be 0 or more"),
        (["--datasets", " , "], "--datasets must be at least one dataset name"),
        (["--datasets", "mbpp,mbpp"], "mbpp more than once"),
        (["--training_subset", "0"], "--training_subset must be a percentage"),
        (["--eval_subset", "101"], "--eval_subset must be a percentage"),
        (["--max_seq_length", "2"], "--max_seq_length must be at least 8"),
        (["--num_epochs", "0"], "--num_epochs must be above 0"),
        (["--max_steps", "0"], "--max_steps must be -1 or at least 1"),
        (["--train_batch_size", "0"], "--train_batch_size must be at least 1"),
        (["--learning_rate", "-1"], "--learning_rate must be above 0"),
        (["--label_smoothing", "1"], "--label_smoothing must be from 0"),
        (["--config", "no/such.yaml"], "--config no/such.yaml cannot be read"),
        (["--init", "olora"], "--init must be one of default, gaussian, orthogonal, eva, pissa, got 'olora'"),
        (["--balance", "even"], "--balance must be one of switch, bias, none, got 'even'"),
        (
            ["--balance", "bias", "--balance_coefficient", "0.1"],
            "--balance_coefficient must be left out where --balance is",
        ),
        (["--balance_update_rate", "0"], "--balance_update_rate must be above 0"),
        (["--experts_per_layer", "2,5"], r"numbers from 1 to the number of experts \(4\), and that number among them"),
        (["--experts_per_layer", "1,2"], "and that number among them, got '1,2'"),
        (["--experts_per_layer", "0,4"], "--experts_per_layer must be numbers from 1"),
        (["--experts_per_layer", "all"], "--experts_per_layer must be numbers from 1"),
        (["--router_learning_rate", "-1"], "--router_learning_rate must be 0 or more, got -1"),
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be at least 1, got 0"),
        (["--lr_strategy", "polynomial"], "--lr_strategy must be one of constant, linear, cosine, cosine_restarts"),
        (["--lr_strategy", "linear", "--cosine_restarts"], "--cosine_restarts must be left out where --lr_strategy is"),
        (["--load_in_4bit", "--load_in_8bit"], "--load_in_8bit must be left out where --load_in_4bit is given"),
        (["--adam_beta3", "0.9"], "unknown argument '--adam_beta3'; did you mean '--adam_beta"),
        (["--adam_beta2", "much"], "cannot be 'much'"),
    ],
)
def test_wrong_flags_name_themselves(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        parse_train(*arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a", "--instruction", "b"], "--prompt must be left out"),
        (["--base_only", "--expert", "expert_0"], "--expert must be left out"),
        (["--num_beams", "2", "--temperature", "1"], "--num_beams must be 1"),
        (["--top_p", "0"], "--top_p must be above 0"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(GenerateArgs, "generate", "", arguments)


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-3\nnum_experts: 8\nbf16: true\nlora_alpha: 4\n")
    flags = parse_train("--config", str(file), "--num_experts", "6")
    assert (flags["learning_rate"], flags["num_experts"], flags["bf16"], flags["lora_alpha"]) == (1e-3, 6, True, 4.0)
    assert flags["lora_r"] == 16


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("num_expert: 2", "unknown key 'num_expert'; did you mean 'num_experts'"),
        ("num_experts: many", "num_experts cannot be 'many'"),
        ("num_experts: 2.5", "num_experts cannot be 2.5"),
        ("bf16: maybe", "bf16 cannot be 'maybe'"),
        ("- a", "must hold 'flag: value' lines, got a list"),
        ("a: [", "is not YAML"),
        ("top_k: 9", "--top_k must be from 1"),
    ],
)
def test_wrong_files_name_the_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as raised:
        parse_train("--config", str(file))
    assert "\n" not in str(raised.value)


def test_the_resolved_configuration_is_a_file_that_gives_the_same(tmp_path: Path) -> None:
    arguments = ["--num_experts", "3", "--learning_rate", "1e-05", "--datasets", "mbpp", "--cosine_restarts"]
    config = parse(TrainConfig, "train", "", arguments)
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    again = parse(TrainConfig, "train", "", ["--config", str(file)])
    assert again.run.config == str(file)
    assert replace(again, run=config.run) == config


def test_a_configuration_may_hold_another_one(tmp_path: Path) -> None:
    config = parse(AcquireConfig, "acquire", "", ["--skills", "mbpp", "--lora_r", "3"])
    assert (config.acquire.names, config.train.experts.lora_r, config.train.experts.num_experts) == (["mbpp"], 3, 1)
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    again = parse(AcquireConfig, "acquire", "", ["--config", str(file)])
    assert again == replace(config, train=replace(config.train, run=again.train.run))


def test_any_other_field_of_the_trainers_arguments_is_a_flag_and_a_key(tmp_path: Path) -> None:
    assert passed_on() == {}
    flags = ["--adam_beta2", "0.95", "--save-strategy", "no", "--torch_compile", "--dataloader_num_workers", "2"]
    wanted = {"adam_beta2": 0.95, "save_strategy": "no", "torch_compile": True, "dataloader_num_workers": 2}
    assert passed_on(*flags, "--optim_target_modules", "q") == {**wanted, "optim_target_modules": "q"}
    file = tmp_path / "run.yaml"
    file.write_text("adam_beta2: 0.5\noptim_args: a=1\noptim_target_modules: [q, k]\nlr_scheduler_kwargs: {power: 2}\n")
    given = passed_on("--config", str(file), "--adam_beta2", "0.9")
    assert given == {
        "adam_beta2": 0.9,
        "optim_args": "a=1",
        "optim_target_modules": ["q", "k"],
        "lr_scheduler_kwargs": {"power": 2},
    }
    file.write_text(to_yaml(parse(TrainConfig, "train", "", flags)))
    assert passed_on("--config", str(file)) == wanted, "what is passed on is in the resolved configuration"
    file.write_text("adam_beta2: [1]")
    with pytest.raises(ConfigError, match="adam_beta2 cannot be \\[1\\]"):
        passed_on("--config", str(file))


@pytest.mark.parametrize("name", REFUSED)
def test_fields_that_would_break_a_promise_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    for arguments in ([f"--{name}", "true"], ["--config", str(tmp_path / "run.yaml")]):
        (tmp_path / "run.yaml").write_text(f"{name}: true")
        with pytest.raises(ConfigError, match=f"--{name} cannot be given: ") as raised:
            parse_train(*arguments)
        assert REFUSED[name] in str(raised.value)


def test_balance_chooses_the_coefficient() -> None:
    assert parse_train("--balance", "bias")["balance_coefficient"] == 0
    assert parse_train("--balance", "none")["balance_coefficient"] == 0
    assert parse_train("--balance", "switch", "--balance_coefficient", "0.2")["balance_coefficient"] == 0.2
    assert parse_train()["balance_update_rate"] == 0.001


def test_experts_per_layer_is_a_list() -> None:
    assert parse(TrainConfig, "train", "", ["--experts_per_layer", "2, 4"]).experts.blocks == [2, 4]
    assert parse(TrainConfig, "train", "", []).experts.blocks is None


def test_cosine_restarts_is_short_for_the_strategy() -> None:
    for flags in (["--cosine_restarts"], ["--lr_strategy", "cosine_restarts"]):
        assert parse(TrainConfig, "train", "", flags).training.schedule == "cosine_restarts"
    assert parse(TrainConfig, "train", "", ["--lr_strategy", "linear"]).training.schedule == "linear"


def test_the_help_is_in_groups_and_leaves_out_what_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TrainConfig, "train", "Any field.", ["--help"])
    shown = capsys.readouterr().out
    for title in ("base model:", "experts and router:", "data:", "training:", "run:"):
        assert title in shown
    assert "Any field." in shown and "--router_learning_rate" in shown
    assert "--[no_]packing" in shown and "--no_packing" not in shown and "--lora_r N " in shown
    assert "--adam_beta2" not in shown and "TrainingArguments:" not in shown
    assert "(default: 0.0)" in shown and "(default: 1.0)" in shown
    assert "default: None" not in shown and "default: True" not in shown and "default: False" not in shown


RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_configuration(recipe: Path) -> None:
    assert parse_train("--config", str(recipe)) != parse_train()


@pytest.mark.parametrize(
    ("limits", "words", "allowed", "refused"),
    [
        (Limits(ge=1), "at least 1", [1, 7], [0, math.nan]),
        (Limits(ge=0), "0 or more", [0, 0.5], [-1e-9]),
        (Limits(gt=0), "above 0", [1e-9, math.inf], [0, -1, math.nan]),
        (Limits(gt=0, le=1), "above 0 and up to 1", [1, 0.5], [0, 1.1]),
        (Limits(ge=0, lt=1), "from 0 up to but not including 1", [0, 0.99], [1, -0.1]),
        (Limits(ge=2, le=3), "from 2 up to 3", [2, 3], [1, 4]),
        (Limits(le=3), "up to 3", [-5, 3], [4]),
        (Limits(gt=0, le=100, wording="a percentage {}"), "a percentage above 0 and up to 100", [100], [101]),
        (Limits(choices=("cut", "drop")), "one of cut, drop", ["cut"], ["", "Cut"]),
        (Limits(pattern="[a-z]+", wording="small letters"), "small letters", ["ab"], ["aB", "a b", ""]),
    ],
)
def test_limits_say_what_they_allow(limits: Limits, words: str, allowed: list[object], refused: list[object]) -> None:
    assert str(limits) == words
    assert all(limits.allow(value) for value in [*allowed, None])
    assert not any(limits.allow(value) for value in refused)


def test_a_group_that_is_made_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="--batch_size must be at least 1, got 0"):
        BenchmarkArgs(batch_size=0)
    with pytest.raises(ConfigError, match="--job_name must be small letters, digits and -, got 'A job'"):
        SubmitArgs(job_name="A job")


def test_a_choice_that_is_nearly_right_is_suggested() -> None:
    with pytest.raises(ConfigError, match="--overlong must be one of cut, drop, got 'crop'; did you mean 'drop'"):
        parse_train("--overlong", "crop")


def test_every_command_has_its_flags_here() -> None:
    assert set(COMMANDS) == set(cli.PROGRAMS)


@pytest.mark.parametrize(
    ("program", "message", "shown"),
    [
        (
            "train",
            "`rank` must be at least 1, got 0; lower `dropout`",
            "--lora_r must be at least 1, got 0; lower --lora_dropout",
        ),
        ("train", "`target_modules` and `no_packing`", "--target_modules and --no_packing"),
        ("train", "`temperature` is not the one of `generate`", "--router_temperature is not the one of `generate`"),
        ("generate", "`temperature`", "--temperature"),
        ("benchmark", "`rank` is not a flag of this program", "`rank` is not a flag of this program"),
        (
            "train",
            "an alias: `base_model`; a field of the trainer: `save_steps`",
            "an alias: --base_model; a field of the trainer: --save_steps",
        ),
        ("experts", "`import`, `as`", "--import, --as"),
        ("submit", "`region`, and `save_minutes` of train", "--region, and --save_minutes of train"),
        ("entrypoint", "`rank`, `unsafe_no_sandbox`", "--lora_r, --unsafe_no_sandbox"),
        (
            "train",
            "run `wandb sync`, or `dylora-moe experts --unfreeze a`",
            "run `wandb sync`, or `dylora-moe experts --unfreeze a`",
        ),
        ("train", "--lora_r must be at least 1, got 0", "--lora_r must be at least 1, got 0"),
    ],
)
def test_parameters_in_messages_become_flags(program: str, message: str, shown: str) -> None:
    assert with_flags(message, COMMANDS[program]) == shown


@pytest.mark.parametrize(
    ("parameters", "flags"),
    [
        ({"target_modules": ["qproj"]}, ["--target_modules", "qproj"]),
        ({"rank": 64, "init": "pissa"}, ["--lora_r", "64", "--init", "pissa"]),
    ],
    ids=["target_modules", "rank"],
)
def test_the_command_line_names_flags_where_python_names_parameters(
    parameters: dict[str, Any], flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = str(write_tiny_folder(tmp_path / "base"))
    with pytest.raises(DyLoRAError) as raised:
        DyLoRA_MoE(base, 1, **parameters)
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(f'{{"prompt": "p{number}", "response": "r"}}\n' for number in range(40)))
    run = ["--model_name", base, "--datasets", f"mine={data}", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", *run, "--num_experts", "1", *flags]) == EXIT_USER_ERROR
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line == f"error: {with_flags(str(raised.value), [TrainConfig])}"
    assert flags[0] in line
