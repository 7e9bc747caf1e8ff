"""The tables of ``data.py``'s result, as Markdown."""

import statistics
from typing import Any


def tables(result: dict[str, Any]) -> dict[str, str]:
    """All tables by name."""
    return {
        "data rows": rows_table(result),
        "data scale": scale_table(result),
        "data throughput": throughput_table(result),
    }


def rows_table(result: dict[str, Any]) -> str:
    """What became of the rows of each dataset."""
    found = result["preprocessing"]
    lines = [
        "| dataset | train | validation | dropped as benchmark tasks | near ones kept | no response | too long | cut |"
        " training tokens | with a loss |",
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
        f"Read, compared with the benchmarks, tokenised and packed with an empty cache at "
        f"{found['tokens_per_second']:,.0f} tokens/s ({found['tokens']:,} tokens in {found['seconds']:.1f} s; a second "
        f"time, from the cache, {found['seconds_from_cache']:.1f} s). Packed into rows of {result['max_length']:,} "
        f"tokens, {1 - found['packing_efficiency']:.2%} of which are padding. {machine['processor']}, "
        f"{machine['threads']} threads; datasets {machine['versions']['datasets']}.",
    ]
    return "\n".join(lines)


def scale_table(result: dict[str, Any]) -> str:
    """Memory and speed by the number of rows."""
    lines = ["| rows | file | tokens | tokens/s | memory it keeps | peak of the process |", "| --- " * 6 + "|"]
    for found in result["scale"]:
        lines.append(
            f"| {found['rows']:,} | {found['file_mib']:,.0f} MiB | {found['tokens']:,} | "
            f"{found['tokens_per_second']:,.0f} | {found['memory_mib']:,.0f} MiB | {found['peak_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


def throughput_table(result: dict[str, Any]) -> str:
    """Labelled tokens per second, and what packing gains."""
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
        f"{result['max_length']:,} tokens, optimiser step included; medians of {rounds} rounds, ratios within rounds "
        "with quartiles.",
    ]
    return "\n".join(lines)
