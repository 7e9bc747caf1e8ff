"""Skills learned one after another: is it new, which expert, and the closed-form router."""

from dylo_moe.skills.acquisition import SkillData, SkillFeatures, acquire_skill, extract_features
from dylo_moe.skills.composition import is_as_solved, learn_routes, mixture_of, routes_of
from dylo_moe.skills.distillation import (
    STUDENT,
    KeptLoss,
    add_student,
    distillation_loss,
    mean_weights,
    student_logits,
)
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
from dylo_moe.skills.teaching import check_clustering, cluster_examples, route_accuracy, teach_router

__all__ = [
    "STUDENT",
    "ExpertFacts",
    "ExportedAdapter",
    "KeptLoss",
    "NoveltyReport",
    "SkillData",
    "SkillFeatures",
    "SkillLibrary",
    "SkillRecord",
    "acquire_skill",
    "add_student",
    "check_clustering",
    "cluster_examples",
    "distillation_loss",
    "export_expert",
    "extract_features",
    "freeze_expert",
    "import_expert",
    "is_as_solved",
    "learn_routes",
    "list_experts",
    "mean_weights",
    "merge_experts",
    "mixture_of",
    "rank_for",
    "read_library",
    "remove_expert",
    "rename_expert",
    "route_accuracy",
    "routes_of",
    "save_with_skills",
    "student_logits",
    "teach_router",
]
