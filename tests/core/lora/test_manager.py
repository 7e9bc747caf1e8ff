"""Experts as PEFT adapters: target modules, active and frozen experts, import and export."""

import copy
import dataclasses
import inspect
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CodeGenConfig, CodeGenForCausalLM, LlamaConfig, LlamaForCausalLM

from dylo_moe import DyLoRA_MoE, ExpertManager
from dylo_moe.core.lora.manager import count_parameters
from dylo_moe.errors import ExpertError, ModelError
from dylo_moe.spec.expert_spec import ExpertSpec
from tests.support.families import FAMILIES, HIDDEN, LAYERS, TIED, mixture, relative_error, stir, tiny, token_ids

IDS = token_ids(2, 8)
TOLERANCE = 1e-9


def adapted(manager: ExpertManager, name: str) -> list[str]:
    """Return the full names of the modules that an expert adapts."""
    marker = f".lora_A.{name}"
    prefix = "base_model.model."
    found = (module for module, _ in manager.peft_model.named_modules() if module.endswith(marker))
    return [module.removeprefix(prefix).removesuffix(marker) for module in found]


def kinds(manager: ExpertManager, name: str) -> set[str]:
    return {module.rpartition(".")[2] for module in adapted(manager, name)}


def trainable(model: nn.Module) -> set[str]:
    """Return the experts that train; fail if one trains in part."""
    states: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            states.setdefault(name.split(".")[-2], set()).add(parameter.requires_grad)
    assert all(len(state) == 1 for state in states.values()), f"an expert trains in part: {states}"
    return {name for name, state in states.items() if state == {True}}


# --- target modules --------------------------------------------------------------------------------------------------

ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
AUTO = {
    "llama": ATTENTION,
    "gemma": ATTENTION,
    "gemma3": ATTENTION,
    "qwen3": ATTENTION,
    "gpt2": {"c_attn"},
    "neox": {"query_key_value"},
}
ALL_LINEAR = {
    **dict.fromkeys(("llama", "gemma", "gemma3", "qwen3"), ATTENTION | {"gate_proj", "up_proj", "down_proj"}),
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_layer", [0, 2])
def test_auto_targets_are_the_attention_projections(family: str, first_layer: int) -> None:
    manager = ExpertManager(tiny(family), first_layer)
    name = manager.create(rank=4)
    assert kinds(manager, name) == AUTO[family]
    assert len(adapted(manager, name)) == len(AUTO[family]) * (LAYERS - first_layer)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("first_layer", [0, 1])
def test_all_linear_is_every_linear_module_of_the_decoder_layers(family: str, first_layer: int) -> None:
    manager = ExpertManager(tiny(family), first_layer)
    name = manager.create(rank=4, target_modules="all-linear")
    assert kinds(manager, name) == ALL_LINEAR[family]
    assert not any("head" in module or "embed" in module for module in adapted(manager, name))
    second = manager.create(rank=2, target_modules="all-linear")
    assert adapted(manager, second) == adapted(manager, name)


@pytest.mark.parametrize(
    ("targets", "wanted"), [("up_proj", {"up_proj"}), (["q_proj", "up_proj"], {"q_proj", "up_proj"})]
)
def test_given_targets(targets: str | list[str], wanted: set[str]) -> None:
    manager = ExpertManager(tiny())
    manager.create()
    assert kinds(manager, manager.create(target_modules=targets)) == wanted
    assert kinds(manager, "expert_0") == ATTENTION


def test_a_model_without_the_usual_targets_is_refused_with_a_list_of_what_it_has() -> None:
    config = CodeGenConfig(vocab_size=31, n_positions=16, n_ctx=16, n_embd=32, n_layer=2, n_head=4, rotary_dim=4)
    base = CodeGenForCausalLM(config)
    with pytest.raises(
        ModelError, match=r"CodeGenForCausalLM has none .* fc_in, fc_out, out_proj, qkv_proj$"
    ) as refused:
        ExpertManager(base).create()
    assert "\n" not in str(refused.value)
    manager = ExpertManager(base)
    assert kinds(manager, manager.create(target_modules=["qkv_proj"])) == {"qkv_proj"}


def test_a_base_that_has_adapters_already_is_refused() -> None:
    base = tiny()
    first = ExpertManager(base)
    first.create()
    stir(first.peft_model)
    before = first.peft_model(IDS).logits
    with pytest.raises(ModelError, match="adapter"):
        ExpertManager(base).create()
    assert torch.equal(first.peft_model(IDS).logits, before)


def test_an_unknown_target_is_refused_with_the_nearest_name() -> None:
    message = r"`target_modules` must be linear modules of Llama.*o_proj, q_proj.*got 'q_prj'; did you mean 'q_proj'\?"
    with pytest.raises(ModelError, match=message):
        ExpertManager(tiny()).create(target_modules=["q_prj"])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_expert_changes_nothing_yet(family: str) -> None:
    base = tiny(family)
    wanted = base(IDS).logits
    manager = ExpertManager(base)
    manager.create(rank=4)
    manager.create(rank=2, target_modules="all-linear")
    assert relative_error(manager.peft_model(IDS).logits, wanted) < TOLERANCE
    assert not any(parameter.requires_grad for name, parameter in base.named_parameters() if "lora_" not in name)


def test_parameters_are_counted() -> None:
    manager = ExpertManager(tiny())
    manager.create(rank=3, target_modules=["q_proj", "up_proj"])
    manager.create("wide", rank=10, target_modules=["q_proj"])
    assert manager.num_parameters("expert_0") == LAYERS * 3 * ((HIDDEN + HIDDEN) + (HIDDEN + 48))
    assert manager.num_parameters("wide") == LAYERS * 10 * (HIDDEN + HIDDEN)
    both = manager.num_parameters("expert_0") + manager.num_parameters("wide")
    assert count_parameters(manager.peft_model, trainable=True) == both
    assert count_parameters(manager.peft_model) == both + count_parameters(tiny())


def test_scaling_is_twice_the_rank_by_default() -> None:
    manager = ExpertManager(tiny())
    manager.create("usual", rank=4)
    manager.create("given", rank=4, alpha=6)
    manager.create("rslora", rank=4, alpha=6, use_rslora=True)
    layer = manager.peft_model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.scaling == {"usual": 2.0, "given": 1.5, "rslora": 3.0}


# --- names and numbers -----------------------------------------------------------------------------------------------


def test_names_count_on_from_the_highest_and_keep_their_order() -> None:
    manager = ExpertManager(tiny())
    names = [manager.create(name, rank=1) for name in (None, "sql", "expert_7", None, "default")]
    assert names == ["expert_0", "sql", "expert_7", "expert_8", "default"] == manager.names == manager.active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"rank": -4}, "`rank` must be at least 1, got -4"),
        ({"alpha": 0.0}, "`alpha` must be above 0, got 0.0"),
        ({"dropout": 1.0}, "`dropout` must be from 0 up to but not including 1, got 1.0"),
        ({"dropout": -0.1}, "`dropout` must be from 0 up to but not including 1, got -0.1"),
        ({"name": "expert_0"}, "there is an expert 'expert_0' already"),
        ({"name": "a.b"}, "an expert's name has letters, digits, _ and - only, got 'a.b'"),
        ({"name": "../a"}, "an expert's name has letters, .* got '../a'"),
        ({"name": ""}, "an expert's name has letters, .* got ''"),
    ],
)
def test_numbers_and_names_out_of_range_are_refused(options: dict[str, object], message: str) -> None:
    model = mixture()
    before = model(IDS).logits
    with pytest.raises(ExpertError, match=message):
        model.add_expert(**options)
    assert (model.experts.names, model.router.num_experts) == (["expert_0", "expert_1", "expert_2"], 3)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    "name", ["0", "1", "layers", "model", "self_attn", "q_proj", "lora_A", "weight", "forward", "keys"]
)
def test_a_name_that_peft_would_mix_up_with_a_module_is_refused(name: str) -> None:
    """PEFT picks an adapter's tensors by ``.name.`` in their keys: such a name would lose tensors when it is saved."""
    with pytest.raises(ExpertError, match=repr(name)):
        mixture().add_expert(name, rank=4)


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal"])
def test_initializations_leave_the_base_and_the_old_experts_as_they_are(init: str) -> None:
    model = mixture(dtype=torch.float32)
    old, before = list(model.experts.names), model(IDS).logits
    model.add_expert("new", rank=4, init=init)
    with model.base_only():
        assert torch.equal(model(IDS).logits, tiny(dtype=torch.float32)(IDS).logits)
    model.experts.set_active(old)
    assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize(
    ("init", "rank"),
    [("olora", 4), ("pissa", 4), ("nonsense", 4), ("orthogonal", 3)],  # PEFT: orthogonal needs an even rank
)
def test_an_impossible_initialization_is_refused(init: str, rank: int) -> None:
    model = mixture(dtype=torch.float32)
    before = model(IDS).logits
    modules = [name for name, _ in model.named_modules()]
    with pytest.raises(ExpertError, match=init):
        model.add_expert(init=init, rank=rank)
    assert [name for name, _ in model.named_modules()] == modules
    assert torch.equal(model(IDS).logits, before)
    with model.base_only():
        assert torch.equal(model(IDS).logits, tiny(dtype=torch.float32)(IDS).logits)


def test_pissa_for_a_single_expert_is_refused() -> None:
    """PiSSA divides the components of the base among all experts of a new mixture."""
    with pytest.raises(ExpertError, match="`init` pissa divides"):
        mixture().add_expert(init="pissa")


def test_a_mixture_has_the_defaults_of_the_spec() -> None:
    defaults = inspect.signature(DyLoRA_MoE.__init__).parameters
    for field in dataclasses.fields(ExpertSpec):
        assert defaults[field.name].default == field.default


@pytest.mark.parametrize("method", ["set_active", "freeze", "unfreeze", "num_parameters"])
def test_an_unknown_expert_is_refused_with_the_nearest_name(method: str) -> None:
    manager = mixture().experts
    with pytest.raises(
        ExpertError, match=r"no expert 'exprt_1' \(there are: expert_0, expert_1, expert_2\); did you mean 'expert_"
    ):
        getattr(manager, method)("exprt_1")


def test_an_unknown_expert_cannot_be_exported_or_loaded_into(tmp_path: Path) -> None:
    manager = mixture().experts
    for method in (manager.export, manager.load_weights):
        with pytest.raises(ExpertError, match=r"no expert 'sql'"):
            method("sql", tmp_path / "sql")
    assert list(tmp_path.iterdir()) == []


def test_without_an_expert_the_base_is_frozen_and_there_is_nothing_to_use() -> None:
    manager = ExpertManager(tiny().requires_grad_(True))
    assert not any(parameter.requires_grad for parameter in manager.base_model.parameters())
    for attribute in ("peft_model", "routing_state"):
        with pytest.raises(ExpertError, match="there is no expert yet; create or import one first"):
            getattr(manager, attribute)


# --- experts and the router's columns --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["created", "imported"])
def test_an_expert_that_the_manager_adds_gets_a_column_of_the_router(tmp_path: Path, how: str) -> None:
    model = mixture()
    before = model(IDS)
    if how == "created":
        model.experts.create("sql", rank=4)
    else:
        foreign_adapter(tmp_path / "sql")
        model.experts.import_adapter(tmp_path / "sql")
    assert model.experts.names[-1] == "sql" and model.router.num_experts == len(model.experts) == 4
    after = model(IDS)
    assert after.routing_weights.shape[-1] == 4
    torch.testing.assert_close(after.router_logits[..., :3], before.router_logits)
    model.save_pretrained(tmp_path / "saved")
    loaded = DyLoRA_MoE.from_pretrained(tmp_path / "saved", tiny())
    loaded.router.double()
    assert loaded.experts.names == model.experts.names
    assert relative_error(loaded(IDS).logits, after.logits) < 1e-6
    loaded.experts.create()
    assert loaded.router.num_experts == 5 and loaded(IDS).routing_weights.shape[-1] == 5


def test_a_copy_grows_its_own_router() -> None:
    model = mixture()
    copied = copy.deepcopy(model)
    copied.experts.create()
    assert (copied.router.num_experts, model.router.num_experts) == (4, 3)


# --- active and frozen -----------------------------------------------------------------------------------------------


def test_set_active_chooses_by_the_routers_order() -> None:
    manager = mixture().experts
    manager.set_active(["expert_2", "expert_0"])
    assert (manager.active, manager.active_indices()) == (["expert_0", "expert_2"], [0, 2])
    assert manager.peft_model.active_adapters == ["expert_0", "expert_2"]
    manager.set_active("expert_1")
    assert manager.active_indices() == [1]
    manager.activate_all()
    assert manager.active == manager.names
    with pytest.raises(ExpertError, match="at least one expert must be active"):
        manager.set_active([])
    assert manager.active == manager.names


def test_one_active_expert_is_the_base_with_that_adapter() -> None:
    model = mixture()
    wanted = {}
    for name in model.experts.names:
        plain = copy.deepcopy(model.model)
        plain.set_adapter(name)
        wanted[name] = plain.merge_and_unload()(IDS).logits
    for name in model.experts.names:
        model.experts.set_active(name)
        assert relative_error(model(IDS).logits, wanted[name]) < TOLERANCE


def test_active_experts_train_unless_frozen() -> None:
    model = mixture()
    manager = model.experts
    assert trainable(model) == {"expert_0", "expert_1", "expert_2"}
    manager.freeze("expert_0")
    assert trainable(model) == {"expert_1", "expert_2"}
    manager.set_active(["expert_0", "expert_1"])
    assert trainable(model) == {"expert_1"}
    manager.freeze("expert_1")
    assert trainable(model) == set()
    manager.unfreeze("expert_0", "expert_1")
    assert trainable(model) == {"expert_0", "expert_1"}
    manager.freeze("expert_2")
    manager.activate_all()
    assert trainable(model) == {"expert_0", "expert_1"}
    assert manager.active == manager.names, "a frozen expert is still routed to"


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["created", "imported"])
def test_a_newcomer_takes_the_mode_of_the_model(tmp_path: Path, training: bool, how: str) -> None:
    """PEFT makes new layers in training mode, and sets the whole model to evaluate when it loads an adapter."""
    model = mixture().train(training)
    if how == "created":
        model.add_expert(dropout=0.5, target_modules="all-linear")
    else:
        path, _ = foreign_adapter(tmp_path / "sql", lora_dropout=0.5)
        model.import_expert(path)
    assert {module.training for module in model.modules()} == {training}


def test_a_frozen_expert_stays_frozen_when_another_joins() -> None:
    model = mixture()
    model.experts.freeze("expert_0", "expert_1", "expert_2")
    model.add_expert("new")
    assert trainable(model) == {"new"}


def test_a_frozen_expert_stays_frozen_after_peft_disabled_adapters() -> None:
    model = mixture()
    model.experts.freeze("expert_0")
    with model.model.disable_adapter():
        model(IDS)
    assert trainable(model) == {"expert_1", "expert_2"}


# --- import and export -----------------------------------------------------------------------------------------------


def foreign_adapter(folder: Path, *, family: str = "llama", **options: object) -> tuple[Path, Tensor]:
    """Return an adapter that PEFT alone trained for a step and saved, and its logits."""
    options = {"r": 5, "lora_alpha": 7, "target_modules": ["q_proj", "down_proj"], **options}
    torch.manual_seed(9)
    model = get_peft_model(tiny(family), LoraConfig(task_type="CAUSAL_LM", **options))
    stir(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder, model.eval()(IDS).logits.detach()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 9}},
        {"layers_to_transform": [1, 2]},
        {"target_modules": r".*layers\.2.*(up|down)_proj"},
    ],
    ids=["plain", "rslora", "rank pattern", "some layers", "regular expression"],
)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_an_adapter_trained_elsewhere_becomes_an_expert(
    tmp_path: Path, options: dict[str, object], first: bool
) -> None:
    path, wanted = foreign_adapter(tmp_path / "sql", **options)
    if first:
        manager = ExpertManager(tiny())
        assert manager.import_adapter(path) == "sql"
        got = manager.peft_model(IDS).logits
    else:
        model = mixture()
        old = {name: parameter.clone() for name, parameter in model.named_parameters() if ".lora_" in name}
        assert model.import_expert(path) == "sql"
        manager = model.experts
        assert manager.names == manager.active == ["expert_0", "expert_1", "expert_2", "sql"]
        assert all(torch.equal(parameter, old[name]) for name, parameter in model.named_parameters() if name in old)
        manager.set_active("sql")
        got = model(IDS).logits
    assert relative_error(got, wanted) < TOLERANCE
    assert relative_error(got, tiny()(IDS).logits) > 0.01, "the adapter must matter, or nothing was checked"
    assert trainable(manager.peft_model) == {"sql"}


@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_expert_is_an_ordinary_adapter(tmp_path: Path, family: str) -> None:
    model = mixture(family, "per_layer")
    model.experts.export("expert_1", tmp_path / "out" / "mine")
    assert {file.name for file in (tmp_path / "out" / "mine").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["mine"]
    loaded = PeftModel.from_pretrained(tiny(family), str(tmp_path / "out" / "mine")).eval()
    model.experts.set_active("expert_1")
    assert relative_error(loaded(IDS).logits, model(IDS).logits) < TOLERANCE
    manager = ExpertManager(tiny(family))
    manager.import_adapter(tmp_path / "out" / "mine", "again")
    assert torch.equal(manager.peft_model(IDS).logits, loaded(IDS).logits)


def test_an_expert_called_default_is_exported_too(tmp_path: Path) -> None:
    model = mixture()
    model.add_expert("default", rank=4)
    stir(model, seed=8)
    for name in model.experts.names:
        model.experts.export(name, tmp_path / name)
        loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / name)).eval()
        model.experts.set_active(name)
        assert relative_error(loaded(IDS).logits, model(IDS).logits) < TOLERANCE


def test_weights_are_loaded_into_an_expert_of_the_same_shape(tmp_path: Path) -> None:
    model, twin = mixture(), mixture(seed=5)
    model.experts.export("expert_2", tmp_path / "two")
    twin.experts.load_weights("expert_0", tmp_path / "two")
    model.experts.set_active("expert_2")
    twin.experts.set_active("expert_0")
    loaded = {name: p for name, p in twin.named_parameters() if ".expert_0." in name}
    for name, parameter in loaded.items():
        assert torch.equal(parameter, dict(model.named_parameters())[name.replace("expert_0", "expert_2")])


@pytest.mark.parametrize(
    "options",
    [{"rank": 6}, {"target_modules": ["q_proj"]}, {"target_modules": "all-linear"}],
    ids=["another rank", "fewer modules", "more modules"],
)
def test_weights_of_another_shape_are_refused_whole(tmp_path: Path, options: dict[str, object]) -> None:
    mixture(seed=5).experts.export("expert_2", tmp_path / "two")
    model = mixture(**options)
    before = model(IDS).logits
    with pytest.raises(ExpertError, match="do not fit expert 'expert_0'") as refused:
        model.experts.load_weights("expert_0", tmp_path / "two")
    assert "\n" not in str(refused.value)
    assert torch.equal(model(IDS).logits, before)


def wrong_shapes(folder: Path) -> None:
    """Cut a column off the last tensor, so that those before it would be loaded already when it fails."""
    weights = load_file(folder / "adapter_model.safetensors")
    last = max(weights)
    save_file({**weights, last: weights[last][:, 1:].contiguous()}, folder / "adapter_model.safetensors")


def missing_tensor(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[max(weights)]
    save_file(weights, folder / "adapter_model.safetensors")


def another_model(folder: Path) -> None:
    config = LlamaConfig(**{**tiny().config.to_dict(), "hidden_size": 40})
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(task_type="CAUSAL_LM", r=5, target_modules=["q_proj"]))
    model.save_pretrained(str(folder))


def cut_short(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])


def not_json(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", ')


def no_type(folder: Path) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_type"]
    (folder / "adapter_config.json").write_text(json.dumps(config))


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def prompt_tuning(folder: Path) -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(tiny(), config).save_pretrained(str(folder))


REFUSED: dict[str, object] = {
    "DoRA": {"use_dora": True},
    "DoRA where no expert is": {"use_dora": True, "target_modules": ["gate_proj"]},
    "lora_bias": {"family": "gpt2", "target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True},
    "on the head": {"target_modules": ["q_proj", "lm_head"]},
    "on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "below the prefix": {"layers_to_transform": [0, 1]},
    "a copy of the head": {"modules_to_save": ["lm_head"]},
    "biases of the base": {"family": "gpt2", "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"},
    "its own tokens": {"trainable_token_indices": [3, 4]},
    "wrong shapes": wrong_shapes,
    "a missing tensor": missing_tensor,
    "another model": another_model,
    "weights cut short": cut_short,
    "configuration cut short": not_json,
    "no adapter type": no_type,
    "no weights": no_weights,
    "prompt tuning": prompt_tuning,
}


@pytest.mark.parametrize("why", REFUSED)
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.filterwarnings(
    "ignore:Adapter '.*'. 3 LoRA tensor.s. have invalid shape",  # PEFT is wrong about lora_bias
    "ignore:Found missing adapter keys",
    "ignore:Adapter .* was active which is now deleted",
    "ignore:Could not find a config file in",  # PEFT 0.19 looks for the base model of the other adapter
    TIED,
)
def test_what_cannot_be_routed_is_refused_and_leaves_no_trace(tmp_path: Path, why: str, first: bool) -> None:
    change = REFUSED[why]
    options = change if isinstance(change, dict) else {}
    family = options.get("family", "llama")
    path, _ = foreign_adapter(tmp_path / "bad", **options)
    if callable(change):
        change(path)
    if first:
        model = base = tiny(family)
        manager = ExpertManager(base, first_layer=1 if why == "below the prefix" else 0)
        import_it = manager.import_adapter
    else:
        model = mixture(family, "prefix:1" if why == "below the prefix" else "final")
        manager, import_it = model.experts, model.import_expert
    model.eval()
    logits, names, active = model(IDS).logits, list(manager.names), list(manager.active)
    modules = {name: type(module) for name, module in model.named_modules()}
    training = {name: parameter.requires_grad for name, parameter in model.named_parameters()}

    with pytest.raises(ExpertError, match=str(path)) as refused:
        import_it(path)

    assert "\n" not in str(refused.value)
    assert torch.equal(model(IDS).logits, logits)
    assert (manager.names, manager.active) == (names, active)
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == training
    if first:
        manager.create("next")
        assert relative_error(manager.peft_model(IDS).logits, logits) < TOLERANCE
    else:
        model.add_expert("next")
        manager.set_active(names)
        assert torch.equal(model(IDS).logits, logits)
