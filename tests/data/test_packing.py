"""Tests of packed rows: they are full, and their examples do not attend to each other."""

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from dylo_moe import DyLoRA_MoE
from dylo_moe.core.base.segments import positions_in_segments, supports_packing
from dylo_moe.data.mixing import FILLER
from dylo_moe.data.packing import TokenCollator, TokenRows, best_fit
from dylo_moe.errors import RoutingError
from tests.support.families import FAMILIES, PAD, ROUTINGS, VOCABULARY, gradients, mixture, relative_error, tiny


@pytest.mark.parametrize("seed", range(5))
def test_best_fit_places_every_example_once_and_wastes_little(seed: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, 300, 2_000)
    rows = best_fit(lengths, 1_000)
    assert sorted(np.concatenate(rows)) == list(range(2_000))
    assert all(lengths[row].sum() <= 1_000 for row in rows)
    assert len(rows) <= -(-lengths.sum() // 1_000) + 1


def obvious_best_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Return the rows of a textbook best-fit decreasing."""
    rows: list[list[int]] = []
    for example in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        room = [capacity - sum(lengths[other] for other in row) for row in rows]
        fitting = [(left, row) for row, left in enumerate(room) if left >= lengths[example]]
        if fitting:
            rows[min(fitting)[1]].append(example)
        else:
            rows.append([example])
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_is_best_fit_decreasing(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 41, random.integers(1, 60))

    def filled(rows: Any) -> list[int]:
        # ties between rows may be broken either way, which changes their content but not their sizes
        return sorted(int(lengths[row].sum()) for row in rows)

    assert filled(best_fit(lengths, 40)) == filled(obvious_best_fit(lengths.tolist(), 40))


def token_rows(capacity: int | None, lengths: tuple[int, ...] = (9, 5, 7, 3, 6, 4, 8)) -> TokenRows:
    generator = torch.Generator().manual_seed(0)
    made = [
        {
            "input_ids": torch.randint(2, VOCABULARY, (length,), generator=generator).tolist(),
            "prompt_length": index % 3,
            "length": length,
        }
        for index, length in enumerate(lengths)
    ]
    return TokenRows(Dataset.from_list(made), np.zeros(len(made), dtype=np.int64), np.array(lengths), capacity)


EXAMPLES = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [8, 9, 4], "prompt_length": 2}]
OTHERS = {
    "token": ([{**EXAMPLES[0], "input_ids": [5, 6, 3]}, EXAMPLES[1]], [0, 1], None),
    "token of the next": (
        [{**EXAMPLES[0], "input_ids": [5, 6]}, {**EXAMPLES[1], "input_ids": [7, 8, 9, 4]}],
        [0, 1],
        None,
    ),
    "prompt": ([{**EXAMPLES[0], "prompt_length": 0}, EXAMPLES[1]], [0, 1], None),
    "order": (EXAMPLES[::-1], [0, 1], None),
    "domain": (EXAMPLES, [1, 0], None),
    "one more": ([*EXAMPLES, EXAMPLES[0]], [0, 1, 1], None),
    "packing": (EXAMPLES, [0, 0], 8),
}


def rows_of(examples: list[dict[str, Any]], domains: list[int], capacity: int | None) -> TokenRows:
    lengths = np.array([len(example["input_ids"]) for example in examples])
    return TokenRows(Dataset.from_list(examples), np.array(domains), lengths, capacity)


@pytest.mark.parametrize("change", OTHERS)
def test_the_digest_of_rows_depends_on_their_contents(change: str) -> None:
    assert rows_of(*OTHERS[change]).digest() != rows_of(EXAMPLES, [0, 1], None).digest()


def test_the_digest_of_rows_depends_on_nothing_else() -> None:
    # a later version must find the same value, and so must a dataset that is read in other parts
    expected = "96312a775816bf0913d46d827686ced41933a812ef65f2d2af3ae883e50bd39e"
    assert rows_of(EXAMPLES, [0, 1], None).digest() == expected
    parts = concatenate_datasets([Dataset.from_list([example]) for example in EXAMPLES])
    assert TokenRows(parts, np.array([0, 1]), np.array([3, 3])).digest() == expected


def batches() -> tuple[dict[str, Tensor], dict[str, Tensor], TokenRows]:
    """Return the same examples as a padded batch, as a packed batch, and as packed rows."""
    plain, packed = token_rows(None), token_rows(16)
    assert len(packed) < len(plain)
    collate = TokenCollator(PAD)
    return (
        collate([plain[index] for index in range(len(plain))]),
        collate([packed[index] for index in range(len(packed))]),
        packed,
    )


def test_a_batch_marks_segments_and_labels() -> None:
    rows = token_rows(16, (5, 4, 3))
    item = rows[0]
    batch = TokenCollator(PAD)([item, {**item, "input_ids": item["input_ids"][:1], "prompt_lengths": [0]}])
    assert batch["segment_ids"].tolist() == [[1] * 5 + [2] * 4 + [3] * 3, [1] * 5 + [0] * 7]
    assert batch["attention_mask"].tolist() == [[1] * 12, [1] * 5 + [0] * 7]
    assert torch.equal(batch["input_ids"][0], torch.tensor(np.concatenate(item["input_ids"])).long())
    assert batch["input_ids"][1, 5:].tolist() == [PAD] * 7
    # prompts of 0, 1 and 2 tokens; the first token of an example has no context
    learned = (batch["labels"] != -100).int().tolist()
    assert learned[0] == [0, 1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 1]
    kept = batch["labels"][0] != -100
    assert torch.equal(batch["labels"][0][kept], batch["input_ids"][0][kept])
    assert positions_in_segments(batch["segment_ids"])[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5, 6]


def placed(packed: TokenRows) -> list[tuple[int, slice, int]]:
    """Return the row, slice and length of each example, in the order of ``token_rows``."""
    assert packed._rows is not None
    found = {}
    for row, members in enumerate(packed._rows):
        start = 0
        for example in members.tolist():
            length = len(packed._examples[example]["input_ids"])
            found[example] = (row, slice(start, start + length), length)
            start += length
    return [found[example] for example in sorted(found)]


def run(model: DyLoRA_MoE, batch: dict[str, Tensor], **options: Any) -> Any:
    return model(**{key: value for key, value in batch.items() if key != "domain"}, **options)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_example_computes_the_same_packed_and_alone(family: str, routing: str, attention: str) -> None:
    model = mixture(family, routing)
    model.experts.base_model.set_attn_implementation(attention)
    padded, packed, rows = batches()
    alone, together = run(model, padded), run(model, packed)
    tolerance = 1e-9 if attention == "sdpa" else 1e-5  # eager attention takes its softmax in float32
    assert relative_error(together.loss, alone.loss) < tolerance
    assert relative_error(together.lm_loss, alone.lm_loss) < tolerance
    for example, (row, place, length) in enumerate(placed(rows)):
        assert relative_error(together.logits[row, place], alone.logits[example, :length]) < tolerance


@pytest.mark.parametrize("routing", ROUTINGS)
def test_packed_training_has_the_same_loss_and_gradients(routing: str) -> None:
    found = []
    for batch in batches()[:2]:
        model = mixture(routing=routing, z_loss_coefficient=0.1).train()
        output = run(model, batch, return_logits=False)
        output.loss.backward()
        found.append((output.loss.detach(), gradients(model)))
    (alone, of_alone), (together, of_together) = found
    assert relative_error(together, alone) < 1e-9
    assert set(of_alone) == set(of_together) and len(of_alone) > 10
    for name, gradient in of_alone.items():
        assert relative_error(of_together[name], gradient) < 1e-7, name


def test_packed_loss_in_float32_and_with_checkpointing() -> None:
    model = mixture(dtype=torch.float32).train()
    padded, packed, _ = batches()
    alone = run(model, padded).loss.item()
    assert run(model, packed).loss.item() == pytest.approx(alone, abs=1e-5)
    model.activation_checkpointing_enable()
    output = run(model, packed)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(alone, abs=1e-5)


def test_flattened_rows_give_the_same_loss() -> None:
    model = mixture()
    _, packed, rows = batches()
    flat = TokenCollator(PAD, flatten=True)([rows[index] for index in range(len(rows))])
    assert flat["input_ids"].shape == (1, sum(rows.lengths))
    assert flat["attention_mask"].all() and flat["segment_ids"].all()
    assert relative_error(run(model, flat).loss, run(model, packed).loss) < 1e-9


def test_flash_attention_gets_one_row_or_an_error() -> None:
    model = mixture()
    _, packed, _ = batches()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(RoutingError, match="separates examples within one row only"):
        run(model, packed)


def test_filler_rows_change_nothing() -> None:
    model = mixture()
    for rows in (token_rows(None), token_rows(16)):
        items = [rows[index] for index in range(len(rows))]
        collate = TokenCollator(PAD)
        with_filler = run(model, collate([*items, rows[FILLER]]))
        without = run(model, collate(items))
        assert relative_error(with_filler.loss, without.loss) < 1e-9
        alone = run(model.train(), collate([rows[FILLER]]), num_items_in_batch=5, num_tokens_in_batch=9)
        assert alone.loss.item() == 0
        alone.loss.backward()
        assert all(torch.isfinite(gradient).all() for gradient in gradients(model).values())
        model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_supports_packing_is_recognized(family: str) -> None:
    model = tiny(family, dtype=torch.float32).train()
    assert supports_packing(model)
    assert model.training


def test_a_model_that_does_not_support_packing_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    recurrent = MambaForCausalLM(MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2))
    assert not supports_packing(recurrent)
