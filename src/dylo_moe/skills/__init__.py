"""Skills learned one after another: is it new, which expert, and the closed-form router."""

from dylo_moe.skills.acquisition import SkillData, acquire_skill
from dylo_moe.skills.expert_edits import (
    ExpertFacts,
    ExportedAdapter,
    export_expert,
    freeze_expert,
    import_expert,
    list_experts,
    merge_experts,
    read_library,
    remove_expert,
    rename_expert,
)
from dylo_moe.skills.library import NoveltyReport, SkillLibrary, SkillRecord, save_with_skills
from dylo_moe.skills.rank_choice import rank_for

__all__ = [
    "ExpertFacts",
    "ExportedAdapter",
    "NoveltyReport",
    "SkillData",
    "SkillLibrary",
    "SkillRecord",
    "acquire_skill",
    "export_expert",
    "freeze_expert",
    "import_expert",
    "list_experts",
    "merge_experts",
    "rank_for",
    "read_library",
    "remove_expert",
    "rename_expert",
    "save_with_skills",
]
