"""Code benchmarks: prompts, generation, a sandbox for the answers, verdicts and scores."""
