"""``compose`` runs on a tiny base model, adapters of PEFT and small files."""

import json
from pathlib import Path

import pytest

from dylo_moe import DyLoRA_MoE
from dylo_moe.cli import main
from dylo_moe.errors import EXIT_USER_ERROR
from tests.support.plain_adapters import write_adapters
from tests.support.tiny_folder import write_tiny_folder

WORDS = {"everywhere": "abab", "rank_stabilized": "#!?#", "patterns": "0420"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    base = write_tiny_folder(tmp_path_factory.mktemp("base"))
    return write_adapters(base, tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, files = tmp_path_factory.mktemp("samples"), {}
    for kind, word in WORDS.items():
        lines = [{"prompt": f"{word} {word}\n", "response": f"{word * (3 + number % 5)}"} for number in range(20)]
        files[kind] = folder / f"{kind}.jsonl"
        files[kind].write_text("".join(json.dumps({**line, "id": kind}) + "\n" for line in lines))
    return files


def arguments(adapters: dict[str, Path], samples: dict[str, Path], output: Path, *more: str) -> list[str]:
    named = [("--adapter", f"{kind}={folder}") for kind, folder in adapters.items()]
    named += [("--sample", f"{kind}={file}") for kind, file in samples.items()]
    return ["compose", *(word for pair in named for word in pair), "--output_dir", str(output), *more]


def test_it_makes_a_mixture_adds_to_it_and_trains_its_router(
    adapters: dict[str, Path], samples: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = ["everywhere", "rank_stabilized"]
    some = ({kind: adapters[kind] for kind in two}, {kind: samples[kind] for kind in two})
    assert main(arguments(*some, tmp_path / "two")) == 0
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["solved"]["rank_stabilized"]["rank_stabilized"] > 0.8
    assert "2 adapters on" in capsys.readouterr().out
    last = ({"patterns": adapters["patterns"]}, {"patterns": samples["patterns"]})
    more = ["--mixture", str(tmp_path / "two"), "--finetune_router", "2"]
    assert main(arguments(*last, tmp_path / "three", *more)) == 0
    model = DyLoRA_MoE.from_pretrained(tmp_path / "three")
    assert model.experts.names == list(adapters)
    assert model.experts.frozen == set(adapters)
    assert "was trained after it was solved" not in capsys.readouterr().out
    again = [*arguments({"fourth": adapters["patterns"]}, {"fourth": samples["patterns"]}, tmp_path / "four")]
    assert main([*again, "--mixture", str(tmp_path / "three")]) == 0
    assert "was trained after it was solved" in capsys.readouterr().out.replace("\n", " ")
    report = json.loads((tmp_path / "three" / "report.json").read_text())
    assert report["finetuned"].keys() == {"patterns"}
    generate = ["generate", "--trained_model", str(tmp_path / "three"), "--prompt", "abab", "--max_new_tokens", "2"]
    assert main(generate) == main([*generate, "--route", "prompt"]) == 0
    assert main(["experts", str(tmp_path / "three"), "--remove", "patterns"]) == 0
    assert DyLoRA_MoE.from_pretrained(tmp_path / "three").experts.names == two


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a, s: (a, dict(list(s.items())[:2])),
            "--sample must be given for each adapter, as NAME=FILE, got none for patterns",
        ),
        (lambda a, s: (a, {**s, "patterns": s["everywhere"]}), "one file for everywhere, patterns"),
        (
            lambda a, s: (a, {**s, "other": s["everywhere"]}),
            "--sample must be of an adapter that --adapter names, got other",
        ),
        (lambda a, s: ({}, {}), "--adapter must be given at least once, as NAME=PATH_OR_ID, got none"),
        (lambda a, s: ({**a, "patterns": Path("/nowhere")}, s), "there is no folder '/nowhere'"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(
    adapters: dict[str, Path],
    samples: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: object,
    message: str,
) -> None:
    assert main(arguments(*change(adapters, samples), tmp_path / "out")) == EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_and_a_name_given_twice_are_refused(
    adapters: dict[str, Path], samples: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(arguments(adapters, samples, tmp_path)) == EXIT_USER_ERROR
    assert "which holds other files" in capsys.readouterr().err
    twice = ["--adapter", f"patterns={adapters['patterns']}"]
    assert main(arguments(adapters, samples, tmp_path / "out", *twice)) == EXIT_USER_ERROR
    assert "--adapter must be given once for each name, got patterns twice" in capsys.readouterr().err
    assert main(arguments(adapters, samples, tmp_path / "out", "--routing", "per_layer")) == EXIT_USER_ERROR
    assert "--routing must be base_context:K" in capsys.readouterr().err
