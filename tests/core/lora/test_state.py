"""The state of a forward belongs to that call: in threads, event loops, nested forwards, and after interrupts."""

import asyncio
import copy
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dylo_moe import DyLoRA_MoE, enable_routing
from dylo_moe.core.lora.extension import Extension
from dylo_moe.core.lora.state import Scope
from dylo_moe.errors import ModelError, RoutingError
from tests.support.families import ROUTINGS, mixture, relative_error, stir, tiny, token_ids

EVERY_ROUTING = pytest.mark.parametrize("routing", ROUTINGS)
PROMPTS = [token_ids(1, 4 + seed % 5, seed=seed) for seed in range(16)]
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def uses(model: DyLoRA_MoE) -> list[Callable[[int], Tensor]]:
    """Return ways to use a model, each for one of the prompts."""

    def generated(index: int) -> Tensor:
        return model.generate(PROMPTS[index], **NEW)

    def mixed(index: int) -> Tensor:
        return model(PROMPTS[index]).logits

    def base(index: int) -> Tensor:
        with model.base_only():
            return model(PROMPTS[index]).logits

    def given(index: int) -> Tensor:
        weights = torch.tensor([[[0.2, 0.3, 0.5]]], dtype=torch.float64)
        return model(PROMPTS[index], routing_weights=weights).logits

    return [generated, mixed, base, given]


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got, want) if want.dtype == torch.long else relative_error(got, want) < 1e-9


@EVERY_ROUTING
@torch.no_grad()
def test_sixteen_threads_get_what_each_gets_alone(routing: str) -> None:
    model = mixture(routing=routing, mature=True, top_k=1)
    alone = [[use(index) for use in uses(model)] for index in range(16)]

    @torch.no_grad()
    def work(index: int) -> list[bool]:
        return [same(use(index), want) for use, want in zip(uses(model), alone[index], strict=True)]

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, [*range(16)] * 2))
    assert all(map(all, results))


@EVERY_ROUTING
@torch.no_grad()
def test_tasks_of_an_event_loop_do_not_meet(routing: str) -> None:
    model = mixture(routing=routing, mature=True)
    alone = [[use(index) for use in uses(model)] for index in range(8)]

    @torch.no_grad()
    def work(index: int) -> list[bool]:
        return [same(use(index), want) for use, want in zip(uses(model), alone[index], strict=True)]

    async def task(index: int, pool: ThreadPoolExecutor) -> bool:
        loop = asyncio.get_running_loop()
        right = await loop.run_in_executor(pool, work, index)
        with model.base_only():
            await asyncio.sleep(0)  # another task runs meanwhile
            right.append(same(model(PROMPTS[index]).logits, alone[index][2]))
            right += [same(await asyncio.to_thread(uses(model)[1], index), alone[index][2])]
        await asyncio.sleep(0)
        right.append(same(model(PROMPTS[index]).logits, alone[index][1]))
        return all(right)

    async def every() -> list[bool]:
        with ThreadPoolExecutor(4) as pool:
            return await asyncio.gather(*(task(index, pool) for index in range(8)))

    assert all(asyncio.run(every()))


@EVERY_ROUTING
@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit, ValueError])
def test_an_interrupted_forward_leaves_no_state_behind(routing: str, error: type[BaseException]) -> None:
    model = mixture(routing=routing)
    before = model(PROMPTS[0]).logits

    def end(*_: object) -> None:
        raise error

    handle = model.experts.decoder.layers[-1].register_forward_hook(end)
    for options in ({}, {"routing_weights": torch.ones(1, 1, 3)}):
        with pytest.raises(error):
            model(PROMPTS[0], **options)
        with pytest.raises(error):
            model.generate(PROMPTS[0], **NEW, **options)
    with pytest.raises(error), model.base_only():
        model(PROMPTS[0])
    handle.remove()
    state = model.experts.routing_state
    assert (state.call, state.scope) == (None, Scope())
    assert torch.equal(model(PROMPTS[0]).logits, before)


@EVERY_ROUTING
def test_a_forward_within_a_forward_has_its_own_state(routing: str) -> None:
    model = mixture(routing=routing)
    want, inner = model(PROMPTS[0]).logits, model(PROMPTS[1]).logits
    seen: list[Tensor] = []

    def again(*_: object) -> None:
        handle.remove()
        seen.append(model(PROMPTS[1]).logits)

    handle = model.experts.decoder.layers[0].register_forward_hook(again)
    output = model(PROMPTS[0])
    assert torch.equal(output.logits, want) and torch.equal(seen[0], inner)
    assert len(output.router_logits) == len(model.router.gates), "the inner forward must not add to the outer record"


@EVERY_ROUTING
def test_a_generator_that_is_closed_ends_its_scope(routing: str) -> None:
    model = mixture(routing=routing)
    want = model(PROMPTS[0]).logits

    def answers() -> Iterator[Tensor]:
        with model.base_only():
            while True:
                yield model(PROMPTS[0]).logits

    running = answers()
    assert not torch.equal(next(running), want)
    running.close()
    assert torch.equal(model(PROMPTS[0]).logits, want)


def test_a_nested_disable_adapter_ends_with_the_outer_one() -> None:
    model = mixture()
    want, trained = model(PROMPTS[0]).logits, {name for name, p in model.named_parameters() if p.requires_grad}
    for disable in (model.disable_adapter, model.model.disable_adapter):
        with disable():
            base = model(PROMPTS[0]).logits
            with disable():
                assert torch.equal(model(PROMPTS[0]).logits, base)
            assert torch.equal(model(PROMPTS[0]).logits, base)
        assert torch.equal(model(PROMPTS[0]).logits, want) and not torch.equal(base, want)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained


@EVERY_ROUTING
def test_the_backbone_alone_is_routed_too(routing: str) -> None:
    model = mixture(routing=routing)
    hidden = model.base_model(input_ids=PROMPTS[0]).last_hidden_state
    assert torch.equal(model.get_output_embeddings()(hidden), model(PROMPTS[0]).logits)
    assert model.experts.routing_state.call is None


def test_forward_called_directly_does_not_ignore_weights() -> None:
    model = mixture(routing="prefix:1")
    weights = torch.rand(1, 4, 3, dtype=torch.float64)
    base = model.experts.base_model
    want = model(PROMPTS[0], routing_weights=weights).logits
    assert torch.equal(base.forward(input_ids=PROMPTS[0], routing_weights=weights).logits, want)
    assert torch.equal(base.forward(input_ids=PROMPTS[0]).logits, model(PROMPTS[0]).logits)


@EVERY_ROUTING
def test_a_forward_in_which_the_router_was_not_reached_raises(routing: str) -> None:
    """As after a change in transformers: the model no longer calls the backbone and layers that the hooks are on."""
    model = mixture(routing=routing)
    plain = tiny().model
    backbone = model.experts.decoder.backbone
    model.experts.base_model.model = plain
    with pytest.raises(
        RoutingError, match=r"0 of \d gates ran in a forward of LlamaForCausalLM, .* load the mixture again"
    ):
        model(PROMPTS[0])
    model.experts.base_model.model = backbone
    assert model(PROMPTS[0]).router_logits is not None


@pytest.mark.parametrize("routing", ["prefix:1", "context:1", "base_context:1"])
def test_a_forward_that_calls_other_layers_raises(routing: str) -> None:
    model = mixture(routing=routing)
    model.experts.decoder.backbone.layers = tiny().model.layers
    with pytest.raises(RoutingError, match=r"0 of 1 gates ran in a forward of LlamaForCausalLM"):
        model(PROMPTS[0])


@EVERY_ROUTING
@torch.no_grad()
def test_each_row_can_have_its_expert(routing: str) -> None:
    model, ids = mixture(routing=routing), token_ids(3, 5)
    names = ["expert_2", "__base__", "expert_0"]
    logits = model(ids, adapter_names=names).logits
    answers = model.generate(ids, adapter_names=names, num_beams=2, **NEW)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.base_only():
                want, answer = model(ids[row : row + 1]).logits, model.generate(ids[row : row + 1], num_beams=2, **NEW)
        else:
            model.experts.set_active(name)
            want, answer = model(ids[row : row + 1]).logits, model.generate(ids[row : row + 1], num_beams=2, **NEW)
            model.experts.activate_all()
        assert relative_error(logits[row : row + 1], want) < 1e-9
        assert torch.equal(answers[row : row + 1], answer)
    with pytest.raises(
        RoutingError, match=r"must be active experts \(expert_0, expert_1, expert_2\) or __base__, got x"
    ):
        model(ids, adapter_names=["x", "expert_0", "expert_1"])
    with pytest.raises(RoutingError, match="give one of them"):
        model(ids, adapter_names=names, routing_weights=torch.ones(1, 1, 3))


@EVERY_ROUTING
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 1, 3), (3, 5, 3), (3, 9, 3)])
@torch.no_grad()
def test_generate_takes_routing_weights(routing: str, shape: tuple[int, int, int]) -> None:
    model, ids = mixture(routing=routing), token_ids(3, 5)
    weights = torch.rand(shape, dtype=torch.float64).softmax(dim=-1)
    answer = model.generate(ids, routing_weights=weights, **NEW)
    assert torch.equal(answer, model.generate(ids, routing_weights=weights, use_cache=False, **NEW))
    longest = answer.shape[1] - 1
    places = torch.arange(longest).clamp(max=shape[1] - 1)
    logits = model(answer[:, :-1], routing_weights=weights[:, places].expand(3, -1, -1)).logits
    assert torch.equal(logits[:, 4:].argmax(dim=-1), answer[:, 5:])


# --- copies ----------------------------------------------------------------------------------------------------------


def saved_and_read(model: nn.Module) -> nn.Module:
    file = BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@EVERY_ROUTING
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_read])
def test_a_copy_is_the_same_and_its_own(routing: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = mixture(routing=routing, mature=True)
    with torch.no_grad():
        twin = copied(model)
        assert torch.equal(twin(PROMPTS[0]).logits, model(PROMPTS[0]).logits)
        assert torch.equal(twin.generate(PROMPTS[0], **NEW), model.generate(PROMPTS[0], **NEW))
        assert twin.experts.routing_state is not model.experts.routing_state
        with twin.base_only():
            assert model(PROMPTS[0]).router_logits is not None
        stir(twin, 9)
        assert not torch.equal(twin(PROMPTS[0]).logits, model(PROMPTS[0]).logits)


# --- taken off -------------------------------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@EVERY_ROUTING
def test_unloading_leaves_a_plain_base_model(routing: str) -> None:
    model, plain = mixture(routing=routing), tiny()
    keys = plain.config.to_dict().keys()
    base = model.model.unload()
    assert type(base) is type(plain) and hooks_of(base) == 0 and "routing" not in vars(base)
    assert not any(isinstance(module, Extension) for module in base.modules())
    assert torch.equal(base(PROMPTS[0]).logits, plain(PROMPTS[0]).logits)
    assert base.config.to_dict().keys() == keys and base.config._name_or_path == plain.config._name_or_path


def test_merging_and_unloading_leaves_a_plain_model() -> None:
    peft_model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    stir(peft_model)
    want = peft_model(PROMPTS[0]).logits
    enable_routing(peft_model)
    merged = peft_model.merge_and_unload()
    assert hooks_of(merged) == 0 and not any(isinstance(module, Extension) for module in merged.modules())
    assert relative_error(merged(PROMPTS[0]).logits, want) < 1e-9


def test_adapters_that_are_added_later_are_routed() -> None:
    peft_model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]), "first")
    enable_routing(peft_model)
    peft_model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["down_proj"]))
    stir(peft_model)
    peft_model.base_model.set_adapter(["first", "second"])
    zero = peft_model(PROMPTS[0], routing_weights=torch.zeros(1, 1, 2)).logits
    assert relative_error(zero, tiny()(PROMPTS[0]).logits) < 1e-12
    peft_model.add_adapter("third", LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(RoutingError, match="'third' uses DoraLinearVariant"):
        peft_model(PROMPTS[0], routing_weights=torch.zeros(1, 1, 2))


def test_a_model_without_peft_is_refused() -> None:
    with pytest.raises(RoutingError, match=r"needs a peft.PeftModel, got a LlamaForCausalLM; make one with peft"):
        enable_routing(tiny())


# --- offloading ------------------------------------------------------------------------------------------------------

CPU = torch.device("cpu")
OFFLOADS: dict[str, Callable[[DyLoRA_MoE, Path], object]] = {
    "base to the CPU": lambda model, folder: accelerate.cpu_offload(model.experts.base_model, CPU),
    "base to the disk": lambda model, folder: accelerate.disk_offload(model.experts.base_model, folder, CPU),
    "all of it": lambda model, folder: accelerate.cpu_offload(model, CPU),
    "the head": lambda model, folder: accelerate.dispatch_model(
        model.experts.base_model, {"model": "cpu", "lm_head": "disk"}, "cpu", offload_dir=folder, force_hooks=True
    ),
}


@EVERY_ROUTING
@pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", OFFLOADS)
@pytest.mark.filterwarnings("ignore:You are calling .generate")  # older versions warn about every offloaded model
@torch.no_grad()
def test_an_offloaded_mixture_computes_the_same(routing: str, mature: bool, way: str, tmp_path: Path) -> None:
    model, ids = mixture(routing=routing, mature=mature), token_ids(2, 7)

    def everything() -> list[Tensor]:
        outputs = [model(ids, labels=ids), model(ids, labels=ids, return_logits=False)]
        with model.base_only():
            base = model(ids).logits
        return [outputs[0].logits, outputs[0].loss, outputs[1].loss, base, model.generate(ids, **NEW)]

    wanted = everything()
    OFFLOADS[way](model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    got = everything()
    assert torch.equal(got[3], wanted[3]) and torch.equal(got[4], wanted[4])
    for one, other in zip(got[:3], wanted[:3], strict=True):
        assert relative_error(one, other) < 1e-9


def test_an_offloaded_base_is_refused_and_the_remedy_works() -> None:
    base = tiny()
    accelerate.cpu_offload(base, CPU)
    with pytest.raises(
        ModelError, match="are offloaded: no expert can be made on it; make the mixture first, and offload that"
    ):
        DyLoRA_MoE(base, 2)
