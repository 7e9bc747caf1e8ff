"""The programs run with a tiny base model, local data and real processes."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from tests.support import full_disk
from tests.support.tiny_folder import write_tiny_folder

ROOT = Path(__file__).parents[2]
DATA = ["--datasets", "python_stdlib,cpp_headers", "--training_subset", "1", "--eval_subset", "4"]
SHORT = [
    *DATA,
    "--max_seq_length",
    "96",
    "--train_batch_size",
    "8",
    "--gradient_accumulation_steps",
    "2",
    "--lora_r",
    "4",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_folder(tmp_path_factory.mktemp("base"))


def script(name: str, *arguments: str, stdin: str = "", **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, str(ROOT / name), *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "100", **environment},
        timeout=300,
    )


def taught(base: Path, output: Path, *more: str) -> list[str]:
    short = ["--max_steps", "2", "--report_to", "none", "--output_dir", str(output)]
    return ["train", "--model_name", str(base), *SHORT, *short, "--eval_strategy", "no", *more]


def test_a_router_is_taught_from_the_datasets_and_stays(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(taught(base, tmp_path, "--teach_router", "domains", "--shared_rank", "2")) == 0
    assert "Solved the router for 2 experts; of held-out examples, it sends" in capsys.readouterr().out
    model = DyLoRA_MoE.from_pretrained(tmp_path / "best_model")
    assert (model.experts.names, model.experts.shared) == (["python_stdlib", "cpp_headers"], "shared")
    assert (model.routing, model.router.top_k) == ("context:1", 1)
    report = json.loads((tmp_path / "report.json").read_text())
    own = [report["mixture"][f"usage/{name}/{name}"] for name in report["domains"]]
    assert report["mixture"]["route_accuracy"] == pytest.approx(sum(own) / 2)
    assert report["mixture"]["route_accuracy"] > 0.6
    # solved again from the same data, it is the same: the steps in between have not trained it
    assert main(taught(base, tmp_path / "again", "--teach_router", "domains", "--max_steps", "4")) == 0
    again = DyLoRA_MoE.from_pretrained(tmp_path / "again" / "best_model")
    assert torch.equal(again.router.gates[0], model.router.gates[0])
    # the first step has a rate of 0, and in the second the experts still add nothing
    more = ["--teach_router", "domains", "--train_router", "--expert_scale", "unit", "--max_steps", "4"]
    assert main(taught(base, tmp_path / "trained", *more)) == 0
    trained = DyLoRA_MoE.from_pretrained(tmp_path / "trained" / "best_model")
    assert not torch.equal(trained.router.gates[0], model.router.gates[0])
    assert (trained.router.expert_scale, model.router.expert_scale) == ("unit", "sum_to_one")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--datasets", "python_stdlib", "--teach_router", "domains"], "--datasets must be two or more where"),
        (["--teach_router", "domains", "--num_experts", "3"], "--num_experts must be left out, or 2 here, got 3"),
        (["--teach_router", "clusters:1"], "--teach_router must be none, domains, or clusters:N with N of at least 2"),
        (["--teach_router", "domains", "--routing", "per_layer"], "--routing must be context:K, base_context:K"),
        (
            ["--teach_router", "domains", "--balance", "bias"],
            "--balance must be left out where --teach_router is given",
        ),
        (["--train_router"], "--train_router must be left out without --teach_router"),
        (["--shared_rank", "-1"], "--shared_rank must be 0 or more, got -1"),
    ],
)
def test_a_router_that_cannot_be_taught_is_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(taught(base, tmp_path / "out", *flags)) == EXIT_USER_ERROR
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_more_clusters_than_examples_are_refused(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn", reason="the extra clusters is not installed")
    flags = ["--teach_router", "clusters:5", "--teach_rows", "2"]
    assert main(taught(base, tmp_path, *flags)) == EXIT_USER_ERROR
    assert "--teach_router must be clusters of at most the number of examples (4), got 5" in capsys.readouterr().err
    assert main(taught(base, tmp_path, "--teach_router", "clusters:2", "--train_router")) == 0
    assert DyLoRA_MoE.from_pretrained(tmp_path / "best_model").experts.names == ["expert_0", "expert_1"]


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Return the output folder of a finished ``python train.py`` and its standard output and error."""
    output = tmp_path_factory.mktemp("run")
    arguments = [
        "--model_name",
        str(base),
        *SHORT,
        "--num_epochs",
        "2",
        "--learning-rate",
        "5e-3",
        "--interleaved_sampling",
    ]
    done = script("train.py", *arguments, "--output_dir", str(output))
    assert done.returncode == 0, done.stderr
    yield output, done.stdout + done.stderr


def test_training_lowers_the_held_out_loss_and_reports_it(run: tuple[Path, str]) -> None:
    output, printed = run
    report = json.loads((output / "report.json").read_text())
    for domain in ("python_stdlib", "cpp_headers"):
        before, after = report["base"][f"loss/{domain}"], report["mixture"][f"loss/{domain}"]
        assert after < before
        assert f"{before:.3f}" in printed and f"{after:.3f}" in printed
        shares = [report["mixture"][f"usage/{domain}/{expert}"] for expert in report["experts"]]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1)
    assert "tokens/s" in printed and "loss=" in printed
    assert f"{report['trainable_parameters']:,}" in printed
    assert f"generate --trained_model {output / 'best_model'} --prompt" in printed


def test_the_report_describes_the_data(run: tuple[Path, str]) -> None:
    data = json.loads((run[0] / "report.json").read_text())["data"]
    assert [found["dataset"] for found in data["contamination"]] == ["python_stdlib", "cpp_headers"]
    assert [found["name"] for found in data["datasets"]] == ["python_stdlib", "cpp_headers"]
    assert all(found["train"] > 0 and found["licence"] for found in data["datasets"])
    assert data["template"] == "plain"
    assert 0.5 < data["packing_efficiency"] <= 1
    assert "Packed into" in run[1]


def test_the_template_is_saved_with_the_mixture(run: tuple[Path, str]) -> None:
    assert DyLoRA_MoE.from_pretrained(run[0] / "best_model").prompt_template == "plain"


def own_file(folder: Path, *extra: str) -> str:
    path = folder / "mine.jsonl"
    rows = [json.dumps({"instruction": f"Say {n}.", "output": f"print({n})"}) for n in range(80)]
    path.write_text("\n".join([*rows, *extra]) + "\n")
    return f"mine={path}"


def test_a_user_file_can_be_trained_on(base: Path, tmp_path: Path) -> None:
    wanted = own_file(tmp_path)
    arguments = ["train", "--model_name", str(base), *SHORT, "--datasets", wanted, "--training_subset", "100"]
    assert main([*arguments, "--eval_subset", "100", "--max_steps", "2", "--output_dir", str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["domains"] == ["mine"]


def test_a_model_that_cannot_be_packed_is_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dylo_moe.runs.training_setup.supports_packing", lambda model: False)
    arguments = ["train", "--model_name", str(base), *SHORT, "--max_steps", "1", "--output_dir", str(tmp_path)]
    assert main(arguments) == EXIT_USER_ERROR
    errors = capsys.readouterr().err
    assert "LlamaForCausalLM lets the examples of a packed row see each other" in errors and "--no_packing" in errors
    assert main([*arguments, "--no_packing"]) == 0


def test_a_warning_names_flags_and_is_printed_above_the_bars(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [json.dumps({"prompt": str(n), "completion": "z" * 92}) for n in range(80)]  # nearly all tokens are equal
    path.write_text("\n".join(rows))
    arguments = ["train", "--model_name", str(base), *SHORT, "--datasets", f"mine={path}", "--training_subset", "100"]
    arguments += ["--router_temperature", "1e-4", "--max_steps", "2", "--logging_steps", "1"]
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if "the router has collapsed" in line]
    assert len(said) == 1 and said[0].rpartition("\r")[2].startswith("warning: the router has collapsed at layer ")
    assert said[0].endswith("up to step 1: raise --balance_coefficient (now 0.01)")
    logging.getLogger("dylo_moe").warning("afterwards")
    assert "warning: afterwards" not in capsys.readouterr().err


def test_a_bad_row_is_reported_by_file_and_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = own_file(tmp_path, '{"instruction": "Say it."}')
    assert main(["train", "--model_name", str(base), *SHORT, "--datasets", wanted]) == EXIT_USER_ERROR
    assert f"{tmp_path}/mine.jsonl line 81: its columns are instruction" in capsys.readouterr().err
    assert main(["datasets", "--datasets", wanted, "--skip_bad_rows"]) == 0
    assert "1 rows; the first:" in capsys.readouterr().out


def test_datasets_are_listed_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["datasets"]) == 0
    listed = capsys.readouterr().out
    assert "code_alpaca" in listed and "sharegpt" in listed.lower()
    assert main(["datasets", "--datasets", own_file(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "### Instruction:" in shown and "train" in shown and "benchmark tasks" in shown


def test_the_parameters_are_counted(run: tuple[Path, str], base: Path) -> None:
    report = json.loads((run[0] / "report.json").read_text())
    model = DyLoRA_MoE.from_pretrained(run[0] / "best_model")
    assert report["base_parameters"] == sum(p.numel() for p in model.model.get_base_model().parameters()) - sum(
        p.numel() for name, p in model.named_parameters() if ".lora_" in name
    )
    assert report["trainable_parameters"] == sum(
        p.numel() for name, p in model.named_parameters() if ".lora_" in name or name.startswith("router.gates")
    )


def test_the_saved_mixture_is_mature_and_has_the_reported_routing(run: tuple[Path, str]) -> None:
    model = DyLoRA_MoE.from_pretrained(run[0] / "best_model").eval()
    assert model.router.maturity == [1, 1, 1, 1]
    assert model.router.is_sparse()
    assert model.routing == json.loads((run[0] / "report.json").read_text())["routing"] == "per_layer"


def test_a_new_process_generates_from_the_checkpoint(run: tuple[Path, str]) -> None:
    checkpoint = str(run[0] / "best_model")
    arguments = ["--trained_model", checkpoint, "--max_new_tokens", "12"]
    done = subprocess.run(
        [sys.executable, "-m", "dylo_moe", "generate", *arguments],
        input="def add(a, b):\n",
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("def add(a, b):\n") and len(done.stdout) > len("def add(a, b):\n") + 3


def test_mixture_expert_base_and_beams_generate(run: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "generate",
        "--trained_model",
        str(run[0] / "best_model"),
        "--prompt",
        "def f(x):\n",
        "--max-new-tokens",
        "16",
    ]
    texts = []
    for extra in ([], ["--expert", "expert_1"], ["--base_only"], ["--num_beams", "3"], ["--temperature", "0.8"]):
        assert main([*common, *extra]) == 0
        texts.append(capsys.readouterr().out)
    assert all(text.startswith("def f(x):\n") for text in texts)
    assert texts[0] != texts[2], "the mixture generated the text of the base model"
    assert main([*common[:3], "--instruction", "Add.", "--max_new_tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("### Instruction:\nAdd.\n\n### Response:\n")


def test_a_run_resumes_from_its_newest_checkpoint(base: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model_name", str(base), *SHORT, "--output_dir", str(tmp_path)]
    assert main([*arguments, "--num_epochs", "1"]) == 0
    steps = json.loads((tmp_path / "report.json").read_text())["steps"]
    assert main([*arguments, "--num_epochs", "2", "--resume_from_checkpoint"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 2 * steps


@pytest.mark.parametrize(
    "flags",
    [
        ["--bf16"],
        ["--gradient_checkpointing", "--routing", "per_layer", "--label_smoothing", "0.1"],
        ["--routing", "final", "--cosine_restarts", "--lora_dropout", "0.1", "--use_rslora"],
        ["--num_experts", "1", "--target_modules", "all-linear", "--z_loss_coefficient", "0.01"],
        ["--no_packing", "--mixing_temperature", "2", "--no_decontaminate"],
        ["--init", "eva", "--num_experts", "2", "--lr_strategy", "constant", "--router_learning_rate", "1e-3"],
        ["--init=pissa", "--num_experts", "2", "--balance", "bias", "--attn_implementation", "eager", "--no_packing"],
        ["--init=orthogonal", "--experts_per_layer", "2,4", "--balance", "none", "--lr_strategy", "linear"],
        ["--adam_beta2", "0.95", "--save_steps", "1", "--optim", "adafactor", "--disable_tqdm", "true"],
    ],
    ids=lambda flags: flags[0],
)
def test_each_set_of_flags_trains(base: Path, tmp_path: Path, flags: list[str]) -> None:
    arguments = ["train", "--model_name", str(base), *SHORT, "--max_steps", "2", "--output_dir", str(tmp_path)]
    assert main([*arguments, *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["steps"] == 2
    assert all(torch.isfinite(torch.tensor(value)) for value in report["mixture"].values())


def test_a_run_without_improvement_stops_early(base: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model_name", str(base), *SHORT, "--max_steps", "9", "--output_dir", str(tmp_path)]
    still = ["--learning_rate", "1e-30", "--eval_steps", "1", "--early_stopping_patience", "2"]
    assert main([*arguments, *still]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 3, (
        "the first evaluation, and two that are no better"
    )


def test_experts_per_layer_and_the_bias_are_in_the_checkpoint(base: Path, tmp_path: Path) -> None:
    arguments = ["train", "--model_name", str(base), *SHORT, "--max_steps", "1", "--output_dir", str(tmp_path)]
    assert main([*arguments, "--experts_per_layer", "1,4", "--balance", "bias", "--balance_update_rate", "0.5"]) == 0
    model = DyLoRA_MoE.from_pretrained(tmp_path / "best_model")
    assert model.experts.experts_per_block == [1, 4] and model.losses.balance_coefficient == 0
    assert model.router.selection_bias.abs().max() >= 0.5
    layers = model.experts.base_model.model.layers
    assert [len(layer.self_attn.q_proj.r) for layer in layers] == [1, 1, 4, 4]


def test_a_dry_run_prints_the_configuration_and_writes_nothing(tmp_path: Path) -> None:
    done = script("train.py", "--dry-run", "--bf16", "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0
    assert "bf16: true" in done.stdout and "model_name: google/codegemma-2b" in done.stdout
    assert not (tmp_path / "out").exists()


def test_every_program_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for program in ("train", "benchmark", "generate", "datasets"):
        assert program in overview
        with pytest.raises(SystemExit) as ended:
            main([program, "--help"])
        assert ended.value.code == 0
        assert "--" in capsys.readouterr().out


def test_a_script_and_its_verb_print_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry_run"]) == 0
    assert script("train.py", "--dry_run").stdout == capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ""),
        (["trian"], "there is no program 'trian'; did you mean 'train'"),
        (["train", "--datasets", "code_alpca"], "did you mean 'code_alpaca'"),
        (["train", "--num_expert", "2"], "did you mean '--num_experts'"),
        (["train", "--model_name", "./nowhere"], "there is no folder './nowhere'"),
        (["train", "--model_name", "nobody/nothing", *DATA], "the Hub cannot be reached"),
        (["train", "--lora_r", "-1"], "--lora_r must be at least 1, got -1"),
        (["train", "--top_k", "5"], "--top_k must be from 1 to the number of experts (4), got 5"),
        (["train", "--model_name", "BASE", "--datasets", "mbpp"], "dataset 'mbpp'"),
        (["train", "--datasets", "humaneval"], "humaneval is a benchmark"),
        (["train", "--datasets", "a=x.jsonl,a=y.jsonl"], "--datasets must be different datasets, got a more than once"),
        (["train", "--model_name", "BASE", "--datasets", "mine=gone.jsonl"], "there is no file or folder gone.jsonl"),
        (["train", "--model_name", "BASE", *DATA, "--template", "chat"], "--template chat needs a model with"),
        (
            ["train", "--model_name", "BASE", *DATA, "--init", "pissa", "--weight_decay", "0.1"],
            "--weight_decay must be 0 with",
        ),
        (["train", "--model_name", "BASE", *DATA, "--optim", "magic"], "is not a valid OptimizerNames"),
        (
            ["train", "--model_name", "BASE", *SHORT, "--attn_implementation", "quick"],
            "--attn_implementation does not fit",
        ),
        (
            ["train", "--model_name", "BASE", *SHORT, "--init", "eva", "--lora_r", "8"],
            "--init eva needs inputs of a width",
        ),
        (["train", "--report_to", "paper"], "--report_to must be auto, none or some of tensorboard, wandb"),
        (["train", "--model_name", "BASE", *SHORT, "--fsdp", "full_shard"], "cannot be used: Using fsdp only works"),
        (["train", "--push_to_hub"], "--push_to_hub cannot be given: a run publishes nothing"),
        (["train", "--overlong", "keep"], "--overlong must be one of cut, drop, got 'keep'"),
        (["train", "--mixing_temperature", "0.5"], "--mixing_temperature must be at least 1, got 0.5"),
        (["datasets", "--datasets", "mine=gone.jsonl"], "there is no file or folder gone.jsonl"),
        (["datasets", "--data_dir", "gone", "--datasets", "mbpp"], "--data_dir must be a folder, got gone"),
        (["train", "--model_name", "BASE", *SHORT, "--routing", "prefix:9"], "prefix:K needs K from 0 to 3"),
        (["train", "--model_name", "BASE", *SHORT, "--target_modules", "qproj"], "did you mean 'q_proj'"),
        (["train", "--model_name", "BASE", *DATA, "--resume_from_checkpoint", "gone"], "there is no folder gone"),
        (["train", "--model_name", "BASE", *DATA, "--resume_from_checkpoint"], "holds no checkpoint"),
        (["generate", "--trained_model", "gone", "--prompt", "x"], "there is no folder 'gone'"),
        (
            ["generate", "--trained_model", "RUN", "--prompt", "x", "--expert", "expert_7"],
            "there is no expert 'expert_7'",
        ),
    ],
)
def test_a_user_error_is_one_line_and_an_exit_code(
    arguments: list[str],
    message: str,
    base: Path,
    run: tuple[Path, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    places = {"BASE": str(base), "RUN": str(run[0] / "best_model")}
    assert main([places.get(word, word) for word in arguments]) == EXIT_USER_ERROR
    errors = capsys.readouterr().err
    if arguments:
        (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert message in line
    assert "Traceback" not in errors


def test_an_unwritable_folder_fails_before_training(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = script("train.py", "--model_name", str(base), *SHORT, "--output_dir", str(tmp_path / "file" / "out"))
    assert done.returncode == EXIT_USER_ERROR
    assert "--output_dir" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_at_the_end_keeps_the_mixture_and_the_old_report(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "report.json").write_text("of an earlier run")
    given = ["--model_name", str(base), *SHORT, "--max_steps", "1", "--output_dir", str(output)]
    done = script("train.py", *given, **full_disk.environment("report.json", tmp_path / "python"))
    assert done.returncode == EXIT_USER_ERROR
    assert "error: No space left on device" in done.stderr and "Traceback" not in done.stderr
    assert DyLoRA_MoE.from_pretrained(output / "best_model").router.maturity == [1, 1, 1, 1]
    assert (output / "report.json").read_text() == "of an earlier run"


class _GatedHub(BaseHTTPRequestHandler):
    """The answer of the Hub to a request for a gated model without a token."""

    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_gated_model_without_a_token_asks_for_one(tmp_path: Path) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _GatedHub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment = {
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
            "HF_HOME": str(tmp_path),
            "HF_HUB_OFFLINE": "0",
        }
        done = script("train.py", *DATA, "--output_dir", str(tmp_path / "out"), **environment)
        hub.shutdown()
    assert done.returncode == EXIT_USER_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "google/codegemma-2b" in line and "HF_TOKEN" in line and "demo" in line
    assert "Traceback" not in done.stderr
