"""Flags, files and defaults: one dataclass field is all of them."""

from pathlib import Path
from typing import Any

import pytest

from dylo_moe.config import GENERATE_GROUPS, LATEST, TRAIN_GROUPS
from dylo_moe.errors import ConfigError
from dylo_moe.flags import parse, to_yaml
from dylo_moe.trainer_fields import REFUSED


def parse_train(*arguments: str) -> dict[str, Any]:
    groups = parse(TRAIN_GROUPS, "train", "", arguments)
    return {key: value for group in groups for key, value in vars(group).items()}


def passed_on(*arguments: str) -> dict[str, Any]:
    """The fields of TrainingArguments that are passed on."""
    given: dict[str, Any] = parse(TRAIN_GROUPS, "train", "", arguments)[4].given
    return given


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
        (["--early_stopping_patience", "0"], "--early_stopping_patience must be 1 or more, got 0"),
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
        parse(GENERATE_GROUPS, "generate", "", arguments)


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
        ("a: [", "is no YAML"),
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
    groups = parse(TRAIN_GROUPS, "train", "", arguments)
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(groups))
    again = parse(TRAIN_GROUPS, "train", "", ["--config", str(file)])
    assert again[:-1] == groups[:-1]


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
    file.write_text(to_yaml(parse(TRAIN_GROUPS, "train", "", flags)))
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
    assert parse(TRAIN_GROUPS, "train", "", ["--experts_per_layer", "2, 4"])[1].blocks == [2, 4]
    assert parse(TRAIN_GROUPS, "train", "", [])[1].blocks is None


def test_cosine_restarts_is_short_for_the_strategy() -> None:
    for flags in (["--cosine_restarts"], ["--lr_strategy", "cosine_restarts"]):
        assert parse(TRAIN_GROUPS, "train", "", flags)[3].schedule == "cosine_restarts"
    assert parse(TRAIN_GROUPS, "train", "", ["--lr_strategy", "linear"])[3].schedule == "linear"


def test_the_help_is_in_groups_and_leaves_out_what_is_passed_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(TRAIN_GROUPS, "train", "Any field.", ["--help"])
    shown = capsys.readouterr().out
    for title in ("base model:", "experts and router:", "data:", "training:", "run:"):
        assert title in shown
    assert "Any field." in shown and "--router_learning_rate" in shown
    assert "--[no_]packing" in shown and "--no_packing" not in shown and "--lora_r N " in shown
    assert "--adam_beta2" not in shown and "TrainingArguments:" not in shown


RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_a_valid_configuration(recipe: Path) -> None:
    assert parse_train("--config", str(recipe)) != parse_train()
