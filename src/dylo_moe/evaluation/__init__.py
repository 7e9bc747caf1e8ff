"""Code benchmarks: prompts, generation, a sandbox for the answers, verdicts and scores."""

from dylo_moe.evaluation.benchmark_run import BenchmarkPrompts, BenchmarkRun
from dylo_moe.evaluation.generation import GenerationSettings, Model
from dylo_moe.evaluation.judging import Judge
from dylo_moe.evaluation.problems import BENCHMARKS, Problem, load_problems
from dylo_moe.evaluation.prompts import COMPLETE, PromptStyle
from dylo_moe.evaluation.results import (
    BenchmarkResult,
    Difference,
    Estimate,
    ModelRecord,
    compare_results,
    read_result,
    write_result,
)
from dylo_moe.evaluation.sandbox import choose_sandbox

__all__ = [
    "BENCHMARKS",
    "COMPLETE",
    "BenchmarkPrompts",
    "BenchmarkResult",
    "BenchmarkRun",
    "Difference",
    "Estimate",
    "GenerationSettings",
    "Judge",
    "Model",
    "ModelRecord",
    "Problem",
    "PromptStyle",
    "choose_sandbox",
    "compare_results",
    "load_problems",
    "read_result",
    "write_result",
]
