"""One version's side of the comparison: run a workload for each request on standard input; see ``__main__``.

Runs with a source tree on PYTHONPATH. It uses only what all compared versions have.
"""

import collections
import json
import sys
import warnings

import torch
from torch.profiler import ProfilerActivity, profile
from transformers.utils import logging

from dylo_moe import DyLoRA_MoE

PROMPT, NEW = 16, 16


class Workloads:
    """The workloads of one version, on mixtures that are made when they are first needed."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(5, 40_000, (8, max(length, PROMPT)), generator=generator)
        self.length = length
        self.models: dict[tuple[str, int], DyLoRA_MoE] = {}

    def run(self, work: str, routing: str, experts: int, batch: int) -> None:
        """Run a train step, a forward, or a greedy generation."""
        if (routing, experts) not in self.models:
            self.models[routing, experts] = DyLoRA_MoE("demo", experts, rank=16, routing=routing, top_k=1)
        model, ids = self.models[routing, experts], self.ids[:batch]
        model.train(work == "train")
        if work == "train":
            ids = ids[:, : self.length]
            model(ids, labels=ids, return_logits=False).loss.backward()
            model.zero_grad()
            return
        model.set_maturity()
        with torch.no_grad():
            if work == "forward":
                model(ids[:, : self.length])
            else:
                options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
                model.generate(ids[:, :PROMPT], **options)

    def operators(self, *arguments: object) -> dict[str, int]:
        """Count the tensor operators of a workload, each with the shapes of its inputs."""
        self.run(*arguments)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
            self.run(*arguments)
        names = (f"{event.name} {event.input_shapes}" for event in profiled.events())
        return dict(collections.Counter(name for name in names if name.startswith("aten::")))


def main() -> None:
    """Answer each line of standard input, a JSON list of a method and its arguments, with a line of JSON."""
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(int(sys.argv[1]))
    workloads = Workloads(int(sys.argv[2]))
    for line in sys.stdin:
        method, *arguments = json.loads(line)
        sys.stdout.write(f"ANSWER {json.dumps(getattr(workloads, method)(*arguments))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
