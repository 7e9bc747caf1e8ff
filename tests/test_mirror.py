"""Tests mirror the source: ``src/dylo_moe/a/b.py`` is tested in ``tests/a/test_b.py``, or where this file says."""

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "dylo_moe"

TESTED_IN = {
    "cli.py": "commands/test_train.py",
    "cloud/secrets.py": "cloud/test_platform.py",
    "cloud/settings.py": "cloud/test_submit.py",
    "cloud/vertex.py": "cloud/test_submit.py",
    "commands/datasets.py": "commands/test_train.py",
    "commands/experts.py": "skills/test_expert_edits.py",
    "commands/generate.py": "commands/test_train.py",
    "commands/submit.py": "cloud/test_submit.py",
    "config/cloud.py": "cloud/test_submit.py",
    "config/commands.py": "config/test_parser.py",
    "config/composition.py": "commands/test_compose.py",
    "config/evaluation.py": "config/test_parser.py",
    "config/model.py": "config/test_parser.py",
    "config/skills.py": "commands/test_acquire.py",
    "config/trainer_fields.py": "runs/test_trainer_arguments.py",
    "core/base/embedded.py": "core/base/test_loading.py",
    "core/base/fingerprint.py": "core/base/test_loading.py",
    "core/base/offload.py": "interop/test_accelerate.py",
    "core/base/segments.py": "core/base/test_structure.py",
    "core/configuration.py": "interop/test_auto_classes.py",
    "core/lora/adapter_files.py": "core/lora/test_manager.py",
    "core/lora/import_checks.py": "core/lora/test_manager.py",
    "core/lora/forward.py": "core/lora/test_state.py",
    "core/lora/layer_experts.py": "core/lora/test_layer.py",
    "core/ordinary_model.py": "core/test_model.py",
    "core/output.py": "core/test_model.py",
    "core/parts.py": "core/test_model.py",
    "core/save_and_load.py": "core/test_checkpoint.py",
    "data/map_rows.py": "data/test_pipeline.py",
    "data/tokenization.py": "data/test_pipeline.py",
    "errors.py": "config/test_parser.py",
    "evaluation/candidate/confinement.py": "evaluation/sandbox/test_hostile.py",
    "evaluation/judging/checker.py": "evaluation/judging/test_judge.py",
    "evaluation/judging/comparison.py": "evaluation/judging/test_judge.py",
    "evaluation/judging/expected_outputs.py": "evaluation/judging/test_judge.py",
    "evaluation/model_digest.py": "evaluation/test_benchmark_run.py",
    "evaluation/sandbox/idle_clock.py": "evaluation/sandbox/test_hostile.py",
    "evaluation/sandbox/runner.py": "evaluation/sandbox/test_hostile.py",
    "evaluation/sandbox/self_check.py": "evaluation/judging/test_judge.py",
    "evaluation/sandbox/visible_files.py": "evaluation/sandbox/test_hostile.py",
    "registration.py": "interop/test_auto_classes.py",
    "reports/benchmark_tables.py": "commands/test_benchmark.py",
    "reports/skill_tables.py": "commands/test_acquire.py",
    "runs/composition.py": "commands/test_compose.py",
    "runs/distillation.py": "skills/test_distillation.py",
    "runs/teaching.py": "commands/test_train.py",
    "runs/benchmark_setup.py": "commands/test_moved_base.py",
    "runs/mixtures.py": "commands/test_moved_base.py",
    "runs/output_folder.py": "commands/test_train.py",
    "runs/resume.py": "training/checkpointing/test_interruption.py",
    "runs/training_loop.py": "training/checkpointing/test_interruption.py",
    "runs/training_setup.py": "commands/test_train.py",
    "skills/features.py": "skills/test_acquisition.py",
    "spec/expert_spec.py": "core/lora/test_manager.py",
    "training/artifacts/fetch.py": "training/artifacts/test_store.py",
    "training/callbacks.py": "commands/test_train.py",
    "training/checkpointing/resumable_trainer.py": "training/checkpointing/test_checkpoints.py",
    "training/monitoring/gradients.py": "training/monitoring/test_processes.py",
}
"""Files without a test file of their own, and the file that tests them."""

FOLDERS_ABOUT_SEVERAL = {"benchmarks", "interop", "tools"}
ABOUT_SEVERAL = {
    *("test_announcements.py", "test_docs.py", "test_earlier_versions.py", "test_imports.py", "test_install.py"),
    *("test_mirror.py", "cloud/test_container.py", "cloud/test_page.py", "cloud/test_recipes.py"),
    *("cloud/test_submit.py", "commands/test_launched.py", "commands/test_moved_base.py", "core/test_compile.py"),
    "core/test_shared_expert.py",
    *("core/test_moved_base.py", "data/test_face.py", "evaluation/sandbox/test_hostile.py"),
    *("evaluation/test_evalplus_data.py", "runs/test_monitoring.py", "skills/test_import_export.py"),
    *("training/checkpointing/test_full_disk.py", "training/checkpointing/test_killed.py"),
    *("training/monitoring/test_processes.py", "training/test_trainer_contract.py"),
}
"""Test files about more than one source file."""

MODULES = sorted(
    str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
)


def own_test(module: str) -> Path:
    """Return the path of the test file that mirrors a source file."""
    path = Path(module)
    return path.with_name(f"test_{path.name}")


@pytest.mark.parametrize("module", MODULES)
def test_each_source_file_is_tested_somewhere(module: str) -> None:
    own, other = own_test(module), TESTED_IN.get(module)
    assert (TESTS / own).exists() != (other is not None), f"{module}: write tests/{own}, or say here where it is tested"
    assert (TESTS / (other or own)).exists()


def test_each_test_file_has_a_source_file() -> None:
    mirrored = {own_test(module) for module in MODULES}
    files = [path.relative_to(TESTS) for path in TESTS.rglob("test_*.py")]
    others = [path for path in files if path not in mirrored and path.parts[0] not in FOLDERS_ABOUT_SEVERAL]
    assert {*map(str, others)} == ABOUT_SEVERAL
    assert TESTED_IN.keys() <= {*MODULES}
