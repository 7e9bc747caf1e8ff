"""Markdown tables of the result of ``benchmarks.data``."""

import statistics
from typing import Any


def tables(result: dict[str, Any]) -> dict[str, str]:
    """Return all tables by name."""
    return {
        "data rows": rows_table(result),
        "data scale": scale_table(result),
        "data throughput": throughput_table(result),
    }


def rows_table(result: dict[str, Any]) -> str:
    """Return the table of the rows of each dataset: kept, dropped, tokens."""
    found = result["preprocessing"]
    lines = [
        "| dataset | train | validation | dropped as benchmark tasks | near matches kept | no response | too long |"
        " truncated | training tokens | labelled tokens |",
        "| --- " * 10 + "|",
    ]
    for summary, near in zip(found["datasets"], found["contamination"], strict=True):
        reasons = [
            f"{near[kind]} {title}"
            for kind, title in (("by_id", "by id"), ("by_gram", "by 13-gram"), ("by_prompt", "by question"))
            if near[kind]
        ]
        dropped = f"{summary['contaminated']:,}" + (f" ({', '.join(reasons)})" if reasons else "")
        cells = [
            f"`{summary['name']}`",
            *(f"{summary[key]:,}" for key in ("train", "validation")),
            dropped,
            f"{near['near']:,}",
            *(f"{summary[key]:,}" for key in ("skipped", "too_long", "cut", "train_tokens", "labelled_tokens")),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    machine = result["environment"]
    lines += [
        "",
        "Reading, comparing with the benchmarks, tokenizing and packing with an empty cache: "
        f"{found['tokens_per_second']:,.0f} tokens/s ({found['tokens']:,} tokens in {found['seconds']:.1f} s; from the "
        f"cache {found['seconds_from_cache']:.1f} s). Packed rows have {result['max_length']:,} tokens, "
        f"{1 - found['packing_efficiency']:.2%} of which are padding. {machine['processor']}, "
        f"{machine['threads']} threads; datasets {machine['versions']['datasets']}.",
    ]
    return "\n".join(lines)


def scale_table(result: dict[str, Any]) -> str:
    """Return the table of memory and speed by number of rows."""
    lines = ["| rows | file | tokens | tokens/s | memory in use after | peak of the process |", "| --- " * 6 + "|"]
    for found in result["scale"]:
        lines.append(
            f"| {found['rows']:,} | {found['file_mib']:,.0f} MiB | {found['tokens']:,} | "
            f"{found['tokens_per_second']:,.0f} | {found['memory_mib']:,.0f} MiB | {found['peak_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


def throughput_table(result: dict[str, Any]) -> str:
    """Return the table of labelled tokens per second, with the gain from packing."""
    found = result["throughput"]
    lines = ["| batches | labelled tokens/s | packed is faster by |", "| --- | --- | --- |"]
    for name, speeds in found["labelled_tokens_per_second"].items():
        gain = found["packed_over"].get(name)
        times = f"{gain['median']:.2f}x ({gain['quartiles'][0]:.2f} to {gain['quartiles'][1]:.2f})" if gain else ""
        lines.append(f"| {name} | {statistics.median(speeds):,.0f} | {times} |")
    rounds = len(found["labelled_tokens_per_second"]["packed"])
    lines += [
        "",
        f"SmolLM2-135M-Instruct, default mixture, float32, batches of {result['batch_size']} rows of at most "
        f"{result['max_length']:,} tokens, optimizer step included; medians of {rounds} rounds, ratios within rounds "
        "with quartiles.",
    ]
    return "\n".join(lines)
