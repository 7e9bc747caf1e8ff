"""Tests of the registry, on rows with the real columns of each dataset, without the Hub."""

import dataclasses
from pathlib import Path

import datasets
import pytest
from datasets.arrow_writer import ArrowWriter

from dylo_moe.data.examples import get_dataset
from dylo_moe.data.readers import rows_of
from dylo_moe.data.registry import AVAILABLE_DATASETS, REGISTRY, refuse_for_training, resolve
from dylo_moe.errors import DatasetError

FIXTURES = Path(__file__).parent / "fixtures"
ON_HUB = [name for name, spec in REGISTRY.items() if spec.on_hub]


def test_eight_hub_datasets_and_two_local_ones_are_registered() -> None:
    assert len(ON_HUB) == 8
    assert set(AVAILABLE_DATASETS) - set(ON_HUB) == {"python_stdlib", "cpp_headers"}
    assert {path.stem for path in FIXTURES.glob("*.jsonl")} == set(ON_HUB)


@pytest.mark.parametrize("name", ON_HUB)
def test_a_row_becomes_a_prompt_with_the_task_and_a_response_with_the_answer(name: str) -> None:
    spec = REGISTRY[name]
    rows = [row for _, row in rows_of(FIXTURES / f"{name}.jsonl")]
    for row in rows:
        assert all(column in row for column in spec.columns)
        for pair in spec.row_format(row):
            assert pair.prompt and pair.response
            assert pair.response not in pair.key
            assert "\r" not in pair.response
    assert spec.license and spec.revision


@pytest.mark.parametrize("name", ON_HUB)
def test_every_dataset_is_found_in_a_folder(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = resolve(name, FIXTURES)
    assert entry.path == FIXTURES / f"{name}.jsonl"
    # four rows do not fill every split
    monkeypatch.setitem(REGISTRY, name, dataclasses.replace(entry.spec, shares=(1.0, 0.0, 0.0)))
    rows = get_dataset(name, data_dir=FIXTURES)["train"]
    assert len(rows) == (5 if name == "python_code_23k_sharegpt" else 4)
    assert set(rows["domain"]) == {name}


def test_shares_and_non_commercial_licenses() -> None:
    assert REGISTRY["code_alpaca"].shares == (0.9, 0.1, 0.0)
    assert REGISTRY["mbpp"].shares == (0.7, 0.1, 0.2)
    assert {name for name, spec in REGISTRY.items() if spec.non_commercial} == {
        "code_alpaca",
        "evol_instruct",
        "python_code_23k_sharegpt",
    }


def test_mbpp_prompts_hold_the_tests_and_responses_the_code() -> None:
    _, row = next(rows_of(FIXTURES / "mbpp.jsonl"))
    (pair,) = REGISTRY["mbpp"].row_format(row)
    assert pair.key.endswith("Your code should pass these tests:\nassert True\nassert 1 == 1")
    assert pair.response == row["code"].replace("\r\n", "\n")
    assert REGISTRY["mbpp"].task_of is not None
    assert REGISTRY["mbpp"].task_of(row) == "Mbpp/900001"


def test_training_on_a_benchmark_is_refused() -> None:
    with pytest.raises(DatasetError, match=r"humaneval is a benchmark.*leave it out of `datasets`"):
        refuse_for_training(resolve("humaneval"))
    refuse_for_training(resolve("mbpp"))


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ("code_alpca", "no dataset 'code_alpca'; did you mean 'code_alpaca'"),
        ("my", "a file of your own is my=path/to/file.jsonl"),
        ("my=", "names no file"),
        ("../x=rows.jsonl", "cannot name a dataset"),
        ("=rows.jsonl", "cannot name a dataset"),
    ],
)
def test_an_unusable_name_is_explained(wanted: str, said: str) -> None:
    with pytest.raises(DatasetError) as caught:
        resolve(wanted)
    assert said in str(caught.value)


def test_a_known_name_with_a_path_keeps_its_rules(tmp_path: Path) -> None:
    entry = resolve(f"mbpp={FIXTURES / 'mbpp.jsonl'}")
    assert entry.spec == REGISTRY["mbpp"] and entry.path == FIXTURES / "mbpp.jsonl"
    with pytest.raises(DatasetError, match=r"`data_dir` must be a folder, got .*none"):
        resolve("mbpp", tmp_path / "none")


def test_without_the_hub_the_message_names_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DatasetError) as caught:
        get_dataset("code_alpaca", data_dir=tmp_path)
    said = str(caught.value)
    assert "hf download sahil2801/CodeAlpaca-20k --repo-type dataset --local-dir DIR/code_alpaca' elsewhere" in said
    assert "`data_dir` DIR" in said and "python_stdlib,cpp_headers" in said


def test_a_datasets_cache_in_the_folder_is_read_without_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache has the layout that ``load_dataset`` writes on a machine with the Hub."""
    folder = tmp_path / "sahil2801___code_alpaca-20k" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    rows = datasets.Dataset.from_list([{"instruction": f"i {n}", "input": "", "output": f"o {n}"} for n in range(50)])
    with ArrowWriter(path=str(folder / "code_alpaca-20k-train.arrow"), features=rows.features) as writer:
        for row in rows:
            writer.write(row)
        count, size = writer.finalize()
    split = {"name": "train", "num_bytes": size, "num_examples": count, "dataset_name": "code_alpaca-20k"}
    names = {"dataset_name": "code_alpaca-20k", "config_name": "default", "version": "0.0.0"}
    datasets.DatasetInfo(features=rows.features, splits={"train": split}, **names).write_to_directory(str(folder))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    splits = get_dataset("code_alpaca", data_dir=tmp_path)
    assert sum(map(len, splits.values())) == 50
    assert splits["train"][0]["prompt"].startswith("### Instruction:\ni ")
