"""The private methods of transformers' Trainer that our trainers override or call have the signatures they rely on.

transformers may change them in any release. If this test fails, compare the new method with the override or the calls
in ``training/trainer.py`` and ``training/resumable.py``, adapt those, and then the signature below. The signatures hold
from transformers 5.10.1 to 5.23.0.
"""

import inspect
from collections.abc import Callable

import pytest
from transformers import Trainer, __version__

from dylo_moe.training.checkpointing.resumable_trainer import ResumableTrainer
from dylo_moe.training.trainer import DyLoRATrainer

OVERRIDDEN = {
    "_determine_best_metric": "(self, metrics, trial)",
    "_evaluate": "(self, trial, ignore_keys_for_eval, skip_scheduler=False)",
    "_get_train_sampler": "(self, train_dataset=None)",
    "_init_training_state": (
        "(self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial)"
    ),
    "_load_best_model": "(self)",
    "_load_from_checkpoint": "(self, resume_from_checkpoint, model=None)",
    "_load_optimizer_and_scheduler": "(self, checkpoint)",
    "_maybe_log_save_evaluate": (
        "(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None)"
    ),
    "_run_epoch": (
        "(self, model, epoch, train_dataloader, steps_in_epoch, num_update_steps_per_epoch, trial, "
        "ignore_keys_for_eval, start_time, resume_from_checkpoint, epochs_trained, steps_trained_in_current_epoch)"
    ),
    "_save_checkpoint": "(self, model, trial)",
    "_save_optimizer_and_scheduler": "(self, output_dir)",
}
CALLED = {
    "_get_output_dir": "(self, trial)",
    "_prepare_inputs": "(self, inputs)",
    "_save_rng_state": "(self, output_dir)",
    "_save_scaler": "(self, output_dir)",
}
"""Private methods that are called and not overridden."""


OURS = (ResumableTrainer, DyLoRATrainer)


def methods() -> dict[str, list[Callable[..., object]]]:
    """Return the methods that our classes themselves define, by name."""
    found: dict[str, list[Callable[..., object]]] = {}
    for owner in OURS:
        for name, method in vars(owner).items():
            if inspect.isfunction(method):
                found.setdefault(name, []).append(method)
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def overridden() -> set[str]:
    """Return the names of our private methods that hide one of the Trainer's, or are marked as doing so."""
    return {
        name
        for name, ours in methods().items()
        if is_private(name) and (hasattr(Trainer, name) or any(hasattr(one, "__override__") for one in ours))
    }


def called() -> set[str]:
    """Return the names of the Trainer's private methods that ours mention without overriding them."""
    mentioned = {name for ours in methods().values() for one in ours for name in one.__code__.co_names}
    return {name for name in mentioned if is_private(name) and hasattr(Trainer, name)} - overridden()


def signature_of(name: str) -> str:
    """Return the signature of a method of the Trainer without its types; "missing" if there is no such method."""
    method = getattr(Trainer, name, None)
    if method is None:
        return "missing"
    signature = inspect.signature(method)
    parameters = [one.replace(annotation=inspect.Parameter.empty) for one in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("name", sorted(overridden() | called() | OVERRIDDEN.keys() | CALLED.keys()))
def test_a_private_method_of_the_trainer_is_unchanged(name: str) -> None:
    known = OVERRIDDEN | CALLED
    assert name in known, f"Trainer.{name}{signature_of(name)} is overridden or called: rename ours, or list it above"
    assert signature_of(name) == known[name], (
        f"transformers {__version__} has changed Trainer.{name}: check its override or calls in "
        "src/dylo_moe/training, then update the signature above"
    )


def test_the_lists_name_what_is_overridden_and_called() -> None:
    assert overridden() == OVERRIDDEN.keys()
    assert called() == CALLED.keys()


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_an_override_accepts_the_arguments_of_the_trainer(name: str) -> None:
    arguments = dict.fromkeys(inspect.signature(getattr(Trainer, name)).parameters)
    for owner in OURS:
        inspect.signature(getattr(owner, name)).bind(**arguments)
