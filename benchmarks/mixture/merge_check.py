"""Whether one adapter at weight 1 comes back from PEFT's merges as it was."""

import torch

from benchmarks.mixture.arms import Setting, peft_model
from benchmarks.mixture.setting import inputs_of
from benchmarks.mixture.study import MERGES, Study


@torch.no_grad()
def difference_of_one_adapter(study: Study, setting: Setting) -> dict[str, float]:
    """Return the largest difference of logits between an adapter and each merge of it alone, at density 1.

    It is a share of the largest difference that the adapter makes to the base.
    """
    (name, *_) = setting.names
    batch = inputs_of(study.batches(study.tasks[0], dev=True)[0])
    model = peft_model(setting).float()
    model.set_adapter(name)
    wanted = model(**batch).logits
    with model.disable_adapter():
        effect = (model(**batch).logits - wanted).abs().max()
    found = {}
    for kind, density in MERGES.items():
        options = {} if density is None else {"density": 1.0}
        model.add_weighted_adapter([name], [1.0], kind, combination_type=kind, **options)
        model.set_adapter(kind)
        found[kind] = float((model(**batch).logits - wanted).abs().max() / effect)
    return found
