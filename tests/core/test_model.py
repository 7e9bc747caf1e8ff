"""The whole model: trained parameters, losses, and independence of batches, padding, precision and copies."""

import copy
import hashlib
import math

import pytest
import torch
from torch import Tensor, nn

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.lora.state import Scope
from dylo_moe.core.routing.balance import expert_load
from dylo_moe.errors import DyLoRAError, ExpertError, ModelError, RoutingError
from tests.support.families import (
    FAMILIES,
    LAYERS,
    PAD,
    ROUTINGS,
    VOCABULARY,
    gradients,
    mixture,
    padded,
    relative_error,
    stir,
    tiny,
    token_ids,
)

TOLERANCE = 1e-9
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
EVERY_ROUTING = pytest.mark.parametrize("routing", ROUTINGS)
SPARSENESS = pytest.mark.parametrize("mature", [False, True], ids=["dense", "sparse"])
SMOOTHING = pytest.mark.parametrize("smoothing", [0.0, 0.1])

ROWS = [token_ids(1, length, seed=length)[0] for length in (4, 11, 7, 9, 3, 12, 5, 8)]
COEFFICIENTS = {"balance_coefficient": 0.3, "z_loss_coefficient": 0.05}
IDS = token_ids(2, 8)


def labels_for(ids: Tensor, mask: Tensor) -> Tensor:
    """Return labels of a batch whose rows start with a prompt of two tokens without a loss."""
    prompt = mask.cumsum(dim=1) <= 2
    return ids.masked_fill((mask == 0) | prompt, -100)


# --- trained parameters ----------------------------------------------------------------------------------------------


def base_checksum(model: DyLoRA_MoE) -> str:
    """Return a checksum of every parameter and buffer that belongs to neither an expert nor the router."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if ".lora_" not in name and not name.startswith("router."):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@EVERY_FAMILY
@EVERY_ROUTING
def test_every_expert_and_gate_moves_and_the_base_does_not(family: str, routing: str) -> None:
    model = DyLoRA_MoE(tiny(family), 3, rank=4, routing=routing, dropout=0.1).train()
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name or name.startswith("router.gates.") for name in trained)
    assert sum(name.startswith("router.gates.") for name in trained) == (LAYERS if routing == "per_layer" else 1)
    before = base_checksum(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, mask = padded(ROWS, "right")
    losses = []
    for _ in range(6):
        loss = model(ids, mask, labels_for(ids, mask)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    still = [name for name, p in model.named_parameters() if name in trained and torch.equal(p, trained[name])]
    assert still == []
    assert base_checksum(model) == before


def test_a_frozen_expert_does_not_move() -> None:
    model = mixture().train()
    model.experts.freeze("expert_1")
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if ".expert_1." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if ".expert_1." in name and not torch.equal(p, frozen[name])}
    assert frozen and moved == set()


# --- the loss --------------------------------------------------------------------------------------------------------


def slow_loss(logits: Tensor, labels: Tensor, smoothing: float) -> float:
    """Return the smoothed cross-entropy in nats, token by token."""
    total, count = 0.0, 0
    for row in range(labels.shape[0]):
        for position in range(1, labels.shape[1]):
            label = int(labels[row, position])
            if label == -100:
                continue
            nats = -logits[row, position - 1].log_softmax(dim=-1)
            total += (1 - smoothing) * nats[label].item() + smoothing * nats.mean().item()
            count += 1
    return total / count


def slow_router_losses(router_logits: Tensor, mask: Tensor, top_k: int) -> tuple[float, float]:
    """Return the balance loss and the z-loss, gate by gate and token by token."""
    balances, zs = [], []
    experts = router_logits.shape[-1]
    for gate in router_logits:
        tokens = gate[mask.bool()]
        chosen = [0.0] * experts
        for token in tokens:
            for expert in sorted(range(experts), key=token.tolist().__getitem__)[-top_k:]:
                chosen[expert] += 1 / top_k / len(tokens)
        mean = [math.fsum(token.softmax(dim=-1)[e].item() for token in tokens) / len(tokens) for e in range(experts)]
        balances.append(experts * sum(f * p for f, p in zip(chosen, mean, strict=True)))
        zs.append(math.fsum(math.log(math.fsum(math.exp(x) for x in token)) ** 2 for token in tokens) / len(tokens))
    return sum(balances) / len(balances), sum(zs) / len(zs)


@EVERY_ROUTING
@SMOOTHING
@pytest.mark.parametrize("training", [True, False])
def test_the_loss_is_the_sum_of_its_parts(routing: str, smoothing: float, training: bool) -> None:
    model = mixture(routing=routing, num_experts=4, **COEFFICIENTS).train(training)
    ids, mask = padded(ROWS[:4], "right")
    labels = labels_for(ids, mask)
    output = model(ids, mask, labels, label_smoothing=smoothing)
    balance, z = slow_router_losses(output.router_logits.detach(), mask, top_k=2)
    assert output.lm_loss.item() == pytest.approx(slow_loss(output.logits.detach(), labels, smoothing), rel=1e-9)
    assert output.balance_loss.item() == pytest.approx(balance, rel=1e-9)
    assert output.z_loss.item() == pytest.approx(z, rel=1e-9)
    assert output.aux_loss.item() == pytest.approx(0.3 * balance + 0.05 * z, rel=1e-9)
    # evaluating, the loss is the cross-entropy alone: its exponential is a perplexity
    added = output.aux_loss.item() if training else 0.0
    assert output.loss.item() == pytest.approx(output.lm_loss.item() + added, rel=1e-12)


def test_smoothing_changes_the_language_model_loss_alone() -> None:
    model = mixture(**COEFFICIENTS).train()
    plain, smooth = model(IDS, labels=IDS), model(IDS, labels=IDS, label_smoothing=0.2)
    assert torch.equal(plain.aux_loss, smooth.aux_loss) and plain.aux_loss > 0.2
    assert smooth.lm_loss != plain.lm_loss


def test_a_coefficient_of_0_leaves_its_loss_out_of_the_sum_and_still_reports_it() -> None:
    output = mixture(balance_coefficient=0.0).train()(IDS, labels=IDS)
    assert output.loss == output.lm_loss
    assert output.balance_loss > 0.5


def test_without_labels_there_is_no_loss_and_with_given_weights_no_router_loss() -> None:
    model = mixture()
    output = model(IDS)
    assert (output.loss, output.lm_loss, output.aux_loss, output.balance_loss, output.z_loss) == (None,) * 5
    given = model(IDS, labels=IDS, routing_weights=torch.full((2, 8, 3), 1 / 3, dtype=torch.float64))
    assert given.aux_loss is None and given.router_logits is None and torch.equal(given.loss, given.lm_loss)


@EVERY_ROUTING
def test_a_balanced_router_has_a_balance_loss_of_1(routing: str) -> None:
    model = mixture(routing=routing)
    with torch.no_grad():
        for gate in model.router.gates:
            gate.mul_(1e-6)
    assert model(IDS, labels=IDS).balance_loss.item() == pytest.approx(1, abs=1e-4)


@EVERY_ROUTING
@SMOOTHING
def test_eight_micro_batches_of_one_are_one_batch_of_eight(routing: str, smoothing: float) -> None:
    model = mixture(routing=routing, **COEFFICIENTS).train()
    ids, mask = padded(ROWS, "right")
    labels = labels_for(ids, mask)
    whole = model(ids, mask, labels, label_smoothing=smoothing)
    whole.loss.backward()
    wanted = gradients(model)
    model.zero_grad()

    load = expert_load(whole.router_logits, mask, model.router.top_k)
    total = 0.0
    for row in range(len(ROWS)):
        cut = slice(0, int(mask[row].sum()) + row % 3)  # each micro-batch is padded to its own length
        part = model(
            ids[row : row + 1, cut],
            mask[row : row + 1, cut],
            labels[row : row + 1, cut],
            label_smoothing=smoothing,
            num_items_in_batch=(labels[:, 1:] != -100).sum(),
            num_tokens_in_batch=mask.sum(),
            expert_load=load,
        )
        part.loss.backward()
        total += part.loss.item()
    got = gradients(model)
    assert total == pytest.approx(whole.loss.item(), rel=1e-9)
    assert got.keys() == wanted.keys() and any(name.startswith("router.") for name in wanted)
    for name, gradient in wanted.items():
        assert relative_error(got[name], gradient) < 1e-9, name


@EVERY_ROUTING
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("family", "prompt"),
    [*((family, True) for family in FAMILIES), ("llama", False)],
    ids=[*FAMILIES, "llama, every token labelled"],
)
def test_padding_changes_neither_loss_nor_gradients(family: str, routing: str, side: str, prompt: bool) -> None:
    model = mixture(family, routing, **COEFFICIENTS).train()
    rows = ROWS[:3]
    tokens = sum(len(row) for row in rows)
    items = sum(len(row) - (2 if prompt else 1) for row in rows)

    def label(ids: Tensor, mask: Tensor) -> Tensor:
        return labels_for(ids, mask) if prompt else ids.masked_fill(mask == 0, -100)

    # each row alone, without any padding
    load = sum(expert_load(model(row[None]).router_logits, None, 2) for row in rows)
    wanted_loss = 0.0
    for row in rows:
        labels = label(row[None], torch.ones(1, len(row), dtype=torch.long))
        output = model(row[None], labels=labels, num_items_in_batch=items, num_tokens_in_batch=tokens, expert_load=load)
        output.loss.backward()
        wanted_loss += output.loss.item()
    wanted = gradients(model)
    assert any(name.startswith("router.") for name in wanted)

    for pad in (PAD, 5, VOCABULARY - 1):
        model.zero_grad()
        ids, mask = padded(rows, side, pad)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        output = model(ids, mask, label(ids, mask), position_ids=positions)
        output.loss.backward()
        assert output.loss.item() == pytest.approx(wanted_loss, rel=1e-9)
        got = gradients(model)
        assert got.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert relative_error(got[name], gradient) < 1e-9, f"{name} with padding token {pad}"


@EVERY_ROUTING
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("given", [False, True], ids=["by the router", "given weights"])
def test_gradient_checkpointing_changes_no_gradient(family: str, routing: str, given: bool, dropout: float) -> None:
    ids, mask = padded(ROWS[:4], "right")
    outcomes = []
    for checkpointing in (False, True):
        model = mixture(family, routing, dropout=dropout, **COEFFICIENTS).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        weights = torch.rand(*ids.shape, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
        weights.requires_grad_()
        torch.manual_seed(0)
        output = model(ids, mask, labels_for(ids, mask), routing_weights=weights if given else None)
        output.loss.backward()
        outcomes.append({**gradients(model), **({"routing_weights": weights.grad} if given else {})})
    plain, checkpointed = outcomes
    assert plain.keys() == checkpointed.keys()
    assert given == ("routing_weights" in plain) == (not any(name.startswith("router.") for name in plain))
    for name, gradient in plain.items():
        assert relative_error(checkpointed[name], gradient) < TOLERANCE, name


@EVERY_ROUTING
def test_gradient_checkpointing_of_the_backbone_alone_changes_no_gradient(routing: str) -> None:
    ids, mask = padded(ROWS[:4], "right")
    outcomes = []
    for checkpointing in (False, True):
        model = mixture("llama", routing, dropout=0.2).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        hidden = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        hidden.square().sum().backward()
        outcomes.append(gradients(model))
    plain, checkpointed = outcomes
    assert plain.keys() == checkpointed.keys() and any(name.startswith("router.") for name in plain)
    for name, gradient in plain.items():
        assert relative_error(checkpointed[name], gradient) < TOLERANCE, name


def test_gradient_checkpointing_can_be_ended_and_refuses_what_would_lose_gradients() -> None:
    model = mixture().train()
    model.gradient_checkpointing_enable()
    model.gradient_checkpointing_disable()
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    with pytest.raises(RoutingError, match=r"`use_reentrant` must be False .*, got True"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


# --- growing ---------------------------------------------------------------------------------------------------------


@EVERY_ROUTING
@SPARSENESS
def test_a_new_expert_leaves_the_old_ones_as_they_were(routing: str, mature: bool) -> None:
    model = mixture(routing=routing, mature=mature)
    old = list(model.experts.names)
    before = model(IDS)
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if not name.startswith("router.")}
    gates = [gate.detach().clone() for gate in model.router.gates]

    assert model.add_expert("new", rank=7, target_modules="all-linear") == "new"
    assert model.router.num_experts == len(model.experts.names) == 4
    assert model.experts.active == [*old, "new"]
    now = dict(model.named_parameters())
    assert all(
        torch.equal(now[name], value) for name, value in parameters.items() if "base_layer" not in name and name in now
    )
    assert all(torch.equal(gate[:3], rows) for gate, rows in zip(model.router.gates, gates, strict=True))
    shares = model(IDS).routing_weights[..., :3]
    dense = before.router_logits.softmax(dim=-1)
    if routing != "per_layer":
        assert relative_error(shares / shares.sum(dim=-1, keepdim=True), dense) < TOLERANCE
    else:  # the new expert is zero still, so each layer's input is the old one's only in the first
        assert relative_error((shares / shares.sum(dim=-1, keepdim=True))[0], dense[0]) < TOLERANCE

    stir(model.model.base_model, seed=2)  # the values that ``mixture`` gave the old experts, and some for the new one
    for name, value in parameters.items():
        if name in now:
            now[name].data.copy_(value)
    assert relative_error(model(IDS).logits, before.logits) > 1e-3, "the new expert must matter, or nothing was checked"
    model.experts.set_active(old)
    after = model(IDS)
    assert torch.equal(after.logits, before.logits)
    assert torch.equal(after.routing_weights, before.routing_weights)
    assert model.router.is_sparse(model.experts.active_indices()) == mature


@EVERY_ROUTING
def test_routing_is_sparse_exactly_when_all_are_mature_and_the_model_evaluates(routing: str) -> None:
    model = mixture(routing=routing)
    for mature in (["expert_0"], ["expert_0", "expert_2"], ["expert_0", "expert_1", "expert_2"]):
        model.set_maturity(0)
        model.set_maturity(1, mature)
        for training in (True, False):
            weights = model.train(training)(IDS).routing_weights
            sparse = len(mature) == 3 and not training
            assert ((weights > 0).sum(dim=-1) == (2 if sparse else 3)).all()
    model.add_expert()
    assert (model.eval()(IDS).routing_weights > 0).all()
    model.set_maturity()
    assert ((model(IDS).routing_weights > 0).sum(dim=-1) == 2).all()


def test_selection_bias_changes_the_choice_but_not_the_ratios() -> None:
    model = mixture(mature=True)
    dense = model(IDS).router_logits.softmax(dim=-1)
    model.router.selection_bias.copy_(torch.tensor([[-100.0, 0, 0]]))
    weights = model(IDS).routing_weights
    assert (weights[..., 0] == 0).all() and (weights[..., 1:] > 0).all()
    torch.testing.assert_close(weights[..., 1] / weights[..., 2], dense[..., 1] / dense[..., 2])


def test_maturity_is_checked() -> None:
    model = mixture()
    with pytest.raises(RoutingError, match=r"`maturity` must be 0 \(young\) or 1 \(mature\), got 2"):
        model.set_maturity(2)
    with pytest.raises(ExpertError, match=r"no expert 'exprt_1' .* did you mean 'expert_"):
        model.set_maturity(1, ["exprt_1"])
    assert model.router.maturity == [0, 0, 0]


def test_parameters_are_counted() -> None:
    model = mixture(rank=4, target_modules=["q_proj"])
    assert sum(map(model.experts.num_parameters, model.experts.names)) == 3 * LAYERS * 4 * (32 + 32)
    assert model.num_base_parameters() == sum(p.numel() for p in tiny().parameters())


# --- precision -------------------------------------------------------------------------------------------------------


@EVERY_FAMILY
@EVERY_ROUTING
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_bfloat16_routes_in_float32_and_is_near_the_float32_model(family: str, routing: str, how: str) -> None:
    rounded = tiny(family, dtype=torch.bfloat16)  # both models have weights that are exact in bfloat16
    exact = mixture(family, routing, dtype=torch.float32, **COEFFICIENTS)
    exact.experts.base_model.load_state_dict(rounded.state_dict(), strict=False)
    for name, parameter in exact.experts.base_model.named_parameters():
        if ".base_layer." in name:
            parameter.data.copy_(rounded.get_parameter(name.replace(".base_layer", "")))
    model = copy.deepcopy(exact)
    if how == "bfloat16":
        model.experts.base_model.to(torch.bfloat16)
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data = parameter.data.float()
                parameter.data.copy_(exact.get_parameter(name))
    wanted = exact.train()(IDS, labels=IDS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        output = model.train()(IDS, labels=IDS)
    output.loss.backward()
    for tensor in (output.routing_weights, output.router_logits, output.loss, output.lm_loss, output.aux_loss):
        assert tensor.dtype == torch.float32
    sums = output.routing_weights.sum(dim=-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
    assert output.logits.isfinite().all()
    found = gradients(model)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found)
    assert relative_error(output.logits.float(), wanted.logits) < 0.1
    assert output.loss.item() == pytest.approx(wanted.loss.item(), rel=0.02)


# --- state -----------------------------------------------------------------------------------------------------------


@EVERY_ROUTING
@pytest.mark.parametrize("training", [False, True])
def test_an_exception_in_a_forward_leaves_nothing_behind(routing: str, training: bool) -> None:
    model = mixture(routing=routing).train(training)
    state = model.experts.routing_state
    before = model(IDS).logits
    beyond = torch.full_like(IDS, VOCABULARY)

    def fail(*_: object) -> None:
        raise KeyError("in the last layer")

    with pytest.raises(IndexError):
        model(beyond)
    with pytest.raises(IndexError):
        model(beyond, routing_weights=torch.ones(2, 8, 3))
    with pytest.raises(RoutingError):
        model(IDS, routing_weights=torch.ones(2, 8, 2))
    with model.base_only(), pytest.raises(IndexError):
        model(beyond)
    layers = next(module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == LAYERS)
    handle = layers[-1].register_forward_hook(fail)
    with pytest.raises(KeyError):
        model(IDS)
    handle.remove()
    assert (state.call, state.scope) == (None, Scope())
    assert all(module.training == training for module in model.modules())
    assert torch.equal(model(IDS).logits, before)


@EVERY_ROUTING
def test_a_model_that_generated_in_inference_mode_trains_afterwards(routing: str) -> None:
    model = mixture(routing=routing, rank=7, alpha=5)  # a shape of no other test, in case tensors are cached
    with torch.inference_mode():
        model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=PAD)
    model.train()(IDS, labels=IDS).loss.backward()
    assert set(gradients(model)) == {name for name, p in model.named_parameters() if p.requires_grad}


@EVERY_ROUTING
def test_base_only_is_the_base_for_a_block(routing: str) -> None:
    model = mixture(routing=routing)
    mixed = model(IDS).logits
    with model.base_only():
        output = model(IDS, labels=IDS)
        assert torch.equal(output.logits, tiny()(IDS).logits)
        assert output.router_logits is None and torch.equal(output.loss, output.lm_loss)
    assert torch.equal(model(IDS).logits, mixed)


def test_merged_adapters_are_refused_everywhere() -> None:
    model = mixture()
    model.model.merge_adapter(["expert_0"])
    with pytest.raises(RoutingError, match=r"\['expert_0'\] are merged into the base; call unmerge_adapter\(\) first"):
        model(IDS)
    with model.base_only(), pytest.raises(RoutingError, match=r"\['expert_0'\] are merged"):
        model(IDS)


@EVERY_ROUTING
def test_a_deep_copy_routes_independently(routing: str) -> None:
    model = mixture(routing=routing)
    before = model(IDS).logits
    twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS).logits, before)
    with twin.base_only():
        assert torch.equal(model(IDS).logits, before)
        assert torch.equal(twin(IDS).logits, tiny()(IDS).logits)
    with torch.no_grad():
        for gate in twin.router.gates:
            gate.neg_()
    assert torch.equal(model(IDS).logits, before)
    assert relative_error(twin(IDS).logits, before) > 1e-3, "the copy must be routed by its own router"
    twin.experts.set_active("expert_0")
    twin.add_expert()
    assert torch.equal(model(IDS).logits, before)
    assert (model.experts.names, model.experts.active) == (["expert_0", "expert_1", "expert_2"],) * 2
    assert twin.experts.names == twin.experts.active == ["expert_0", "expert_1", "expert_2", "expert_3"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_experts": 2, "top_k": 3}, RoutingError, r"`top_k` must be from 1 to the number of experts \(2\), got 3"),
        ({"num_experts": 0}, RoutingError, "`num_experts` must be at least 1, got 0"),
        ({"temperature": 0.0}, RoutingError, "`temperature` must be above 0, got 0.0"),
        ({"rank": -1}, ExpertError, "`rank` must be at least 1, got -1"),
        ({"dropout": 1.5}, ExpertError, "`dropout` must be from 0 .* got 1.5"),
        (
            {"routing": "lst"},
            RoutingError,
            "`routing` must be final, per_layer, prefix:K, context:K or base_context:K, got 'lst'",
        ),
        ({"routing": "prefix:9"}, RoutingError, "prefix:K needs K from 0 to 2 for this model, got 'prefix:9'"),
        (
            {"target_modules": ["c_attn"]},
            ModelError,
            r"`target_modules` must be linear modules of LlamaForCausalLM \(down_.*\), got 'c_attn'",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_base_is_touched(
    options: dict[str, object], error: type[DyLoRAError], message: str
) -> None:
    base = tiny()
    with pytest.raises(error, match=message) as refused:
        DyLoRA_MoE(base, **{"num_experts": 2, **options})
    assert "\n" not in str(refused.value)
    assert not any("lora_" in name for name, _ in base.named_modules())
    assert torch.equal(base(IDS).logits, tiny()(IDS).logits)
