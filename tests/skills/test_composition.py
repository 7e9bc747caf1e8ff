"""Mixtures of adapters that PEFT made: each token equals PEFT's own result with the adapter that it is sent to."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dylo_moe import DyLoRA_MoE
from dylo_moe.errors import ExpertError, RoutingError
from dylo_moe.skills.composition import base_name_of, learn_routes, mixture_of, routes_of
from dylo_moe.skills.expert_edits import remove_expert
from dylo_moe.skills.library import SkillLibrary, save_with_skills
from tests.support.families import padded, relative_error
from tests.support.plain_adapters import KINDS, with_adapter

PLACES = {"everywhere": (5, 9), "rank_stabilized": (90, 94), "patterns": (200, 204)}
"""Tokens that the texts of each adapter's task are made of."""


def texts(kind: str, count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(*PLACES[kind], (20 + index % 5,), generator=generator) for index in range(count)]
    made = [padded(rows[start : start + 8], "right") for start in range(0, count, 8)]
    return [{"input_ids": ids, "attention_mask": mask} for ids, mask in made]


def composed(base: Path, adapters: dict[str, Path]) -> tuple[DyLoRA_MoE, SkillLibrary]:
    model = mixture_of(adapters, str(base), routing="base_context:1")
    library = SkillLibrary(model.router.hidden_size)
    learn_routes(model, library, {kind: texts(kind) for kind in adapters})
    return model, library


@torch.no_grad()
def test_each_text_goes_to_its_adapter_and_equals_peft_with_it(base: Path, adapters: dict[str, Path]) -> None:
    model, _ = composed(base, adapters)
    for column, kind in enumerate(KINDS):
        (batch, *_) = texts(kind, count=8, seed=1)
        output = model(**batch)
        real = batch["attention_mask"].bool()
        assert output.routing_weights[0, ..., column][real].all(), "every token of this text must go to its adapter"
        wanted = with_adapter(base, adapters[kind])(**batch).logits
        assert relative_error(output.logits[real], wanted[real]) < 1e-5
        prompt = {name: value[:1, :12] for name, value in batch.items()}
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        alone = model.generate(**prompt, adapter_names=[kind], **options)
        assert torch.equal(alone, with_adapter(base, adapters[kind]).generate(**prompt, **options))


def test_no_file_and_no_weight_of_an_adapter_or_the_base_changes(base: Path, adapters: dict[str, Path]) -> None:
    def contents(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    folders = [base, *adapters.values()]
    before = [contents(folder) for folder in folders]
    model, _ = composed(base, adapters)
    assert [contents(folder) for folder in folders] == before
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


def test_an_adapter_is_added_later_and_removed_again(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    three, three_library = composed(base, adapters)
    first_two = {kind: adapters[kind] for kind in list(adapters)[:2]}
    model, library = composed(base, first_two)
    model.experts.freeze(model.import_expert(adapters["patterns"], "patterns"))
    learn_routes(model, library, {"patterns": texts("patterns")})
    torch.testing.assert_close(model.router.gates[0], three.router.gates[0], rtol=1e-5, atol=1e-6)
    assert model.experts.frozen == set(adapters)
    save_with_skills(three, three_library, tmp_path / "mixture")
    remove_expert(tmp_path / "mixture", "everywhere")
    smaller = DyLoRA_MoE.from_pretrained(tmp_path / "mixture")
    assert smaller.experts.names == ["rank_stabilized", "patterns"]
    assert routes_of(smaller, texts("patterns", seed=2))["patterns"] > 0.99


@torch.no_grad()
def test_a_text_that_changes_its_task_changes_its_adapter(base: Path, adapters: dict[str, Path]) -> None:
    model, _ = composed(base, adapters)
    (one, *_), (other, *_) = texts("everywhere", 8, seed=3), texts("patterns", 8, seed=3)
    ids = torch.cat([one["input_ids"][:1, :20], other["input_ids"][:1, :20].repeat(1, 4)], dim=1)
    chosen = model(ids).routing_weights[0, 0].argmax(dim=-1)
    assert chosen[:20].eq(0).all()
    assert chosen[-20:].eq(2).all()


def test_what_cannot_be_composed_is_refused(base: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExpertError, match="no adapter to compose"):
        mixture_of({}, str(base))
    other = shutil.copytree(adapters["patterns"], tmp_path / "other")
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "another/base"}))
    with pytest.raises(
        ExpertError, match=r"different base models \(one: .*, two: another/base\); give theirs as `base"
    ):
        base_name_of({"one": adapters["everywhere"], "two": other})
    mixture_of({"one": adapters["everywhere"], "two": other}, str(base))  # the remedy
    ia3 = {"peft_type": "IA3", "task_type": "CAUSAL_LM", "target_modules": ["k_proj"], "feedforward_modules": []}
    (other / "adapter_config.json").write_text(json.dumps(ia3))
    with pytest.raises(ExpertError, match="only LoRA adapters can be routed"):
        mixture_of({"one": adapters["everywhere"], "two": other}, str(base))
    with pytest.raises(ExpertError, match="layers that carry experts"):
        mixture_of(adapters, str(base), routing="context:1")
    with pytest.raises(RoutingError, match="`routing` must be context:K, base_context:K"):
        learn_routes(mixture_of(adapters, str(base), routing="per_layer"), SkillLibrary(32), {})
    model, library = composed(base, adapters)
    with pytest.raises(ExpertError, match="learned already"):
        learn_routes(model, library, {"patterns": texts("patterns")})
    with pytest.raises(ExpertError, match="there is no expert 'pattern'"):
        learn_routes(model, library, {"pattern": texts("patterns")})
