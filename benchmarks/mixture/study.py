"""One set of tasks of study B: its adapters, its held-out rows, and every arm at its best options."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from transformers import PreTrainedTokenizerBase

from benchmarks.mixture.arms import ARMS, TUNED_ARMS, Arm, Setting, lora_arm, merge_arm
from benchmarks.mixture.plain_lora import ROWS, STEPS, train_adapter
from benchmarks.mixture.rows import measured_rows
from benchmarks.mixture.setting import Batch, Results, batches_of, best_on_ladder, first_rows, tokenize
from benchmarks.mixture.tasks import Task, mbxp, superni

RATES = [2.5e-4 * 2**step for step in range(8)]
SCALES = [0.25 * 2**step for step in range(9)]
"""Scales of merges, as multiples of 1 / number of adapters."""

DENSITIES = (0.2, 0.5, 0.8)
MERGES = {
    "linear": None,
    "cat": None,
    "svd": None,
    "ties": 0.5,
    "dare_linear": 0.5,
    "dare_ties": 0.5,
    "magnitude_prune": 0.5,
}
"""PEFT's merges, and the density at which the best scale of those that have one is searched."""

SAMPLE_ROWS, DEV_ROWS = 32, 8
"""Examples of each task that gates are solved or trained on, and rows that scales and rates are chosen on."""

HELD_OUT_ROWS, HELD_OUT_TOKENS, AT_LEAST = 40, 2600, 12
"""Most held-out rows of a task; fewer, but at least twelve, if they have so many tokens."""

SETS = {
    "superni": lambda folder: superni(folder, definitions=True),
    "hard": lambda folder: superni(folder, definitions=False),
    "mbxp": mbxp,
}


class Study:
    """One set of tasks, with adapters that are trained when they are first needed.

    Args:
        name: Name of the set.
        tasks: Its tasks.
        results: File of results.
        work: Folder for what is kept between runs.
        tokenizer: The base's tokenizer.
    """

    def __init__(
        self, name: str, tasks: Sequence[Task], results: Results, work: Path, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.name, self.tasks, self.results = name, tasks, results
        self.work, self.tokenizer = work / name, tokenizer
        self._batches: dict[tuple[str, bool], list[Batch]] = {}

    def batches(self, task: Task, dev: bool) -> list[Batch]:
        """Return the held-out rows of a task, or those that choices are made on."""
        key = (task.name, dev)
        if key not in self._batches:
            rows = tokenize(
                task.dev if dev else task.held_out, self.tokenizer, self.work, DEV_ROWS if dev else HELD_OUT_ROWS, 0
            )
            chosen = first_rows(rows, HELD_OUT_TOKENS, AT_LEAST)
            chosen.sort(key=lambda row: len(row["input_ids"][0]))  # of similar length together, for speed
            self._batches[key] = batches_of(chosen, self.tokenizer)
        return self._batches[key]

    def best_rate(self, task: Task) -> float:
        """Return the rate at which a task's adapter has the lowest loss on rows that are not held out.

        SuperNI without definitions uses the rates that were found with them.
        """
        searched = "superni" if self.name == "hard" else self.name

        def loss(rate: float) -> float:
            def measure() -> float:
                assert searched == self.name, "measure the set with definitions first"
                return self.mean_loss(lora_arm(self._adapter(task, rate, seed=0)), [task])

            return float(self.results.run(f"{searched}/rate/{task.name}/{rate:g}", measure))

        return best_on_ladder(RATES, RATES.index(2e-3), loss)

    def _adapter(self, task: Task, rate: float, seed: int) -> Path:
        rows = tokenize(task.train, self.tokenizer, self.work, STEPS * ROWS, seed)
        folder = self.work / "adapters" / f"{task.name}-{rate:g}-{seed}"
        return train_adapter(rows, self.tokenizer, folder, rate=rate, seed=seed, steps=STEPS)

    def setting(self, tasks: Sequence[Task], seed: int) -> Setting:
        """Return the adapters and the examples of some tasks."""
        return Setting(
            {task.name: self._adapter(task, self.best_rate(task), seed) for task in tasks},
            {
                task.name: tokenize(task.train, self.tokenizer, self.work, SAMPLE_ROWS, seed=100 + seed)
                for task in tasks
            },
            self.tokenizer,
            self.work,
            seed,
        )

    def arm(self, name: str, setting: Setting, tasks: Sequence[Task]) -> tuple[Arm, dict[str, float]]:
        """Return an arm by its name, and the options that were chosen for it."""
        if name in ARMS:
            return ARMS[name](setting), {}
        if name == "joint":
            return lora_arm(self._joint(setting, tasks)), {}
        options = self._options(name, setting, tasks)
        if name in TUNED_ARMS:
            return TUNED_ARMS[name](setting, **options), options
        return merge_arm(setting, name, options["scale"], options.get("density")), options

    def _options(self, name: str, setting: Setting, tasks: Sequence[Task]) -> dict[str, float]:
        """Return the options at which an arm has the lowest loss on the rows that choices are made on."""
        place = f"{self.name}/{len(tasks)}/choice/{name}"

        def tuned(rate: float) -> float:
            return self.mean_loss(TUNED_ARMS[name](setting, rate), tasks)

        def merged(scale: float, density: float | None) -> float:
            return self.mean_loss(merge_arm(setting, name, scale, density), tasks)

        if name in TUNED_ARMS:
            rates = [rate / 4 for rate in RATES]
            rate = best_on_ladder(
                rates, 3, lambda rate: float(self.results.run(f"{place}/{rate:g}", lambda: tuned(rate)))
            )
            return {"rate": rate}

        def found(scale: float, density: float | None) -> float:
            return float(self.results.run(f"{place}/{scale:g}/{density}", lambda: merged(scale, density)))

        density = MERGES[name]
        scale = best_on_ladder(SCALES, 3, lambda scale: found(scale, density))
        if density is None:
            return {"scale": scale}
        return {"scale": scale, "density": min(DENSITIES, key=lambda density: found(scale, density))}

    def _joint(self, setting: Setting, tasks: Sequence[Task]) -> Path:
        """Return one LoRA that was trained on the rows of all tasks, for as many steps as their adapters together."""
        rows = [row for task in tasks for row in task.train[: STEPS * ROWS]]
        steps = STEPS * len(tasks)
        tokens = tokenize(rows, self.tokenizer, self.work, steps * ROWS, setting.seed)
        folder = self.work / "adapters" / f"joint-{len(tasks)}-{setting.seed}"
        rates = sorted(self.best_rate(task) for task in tasks)
        rate = rates[len(rates) // 2]
        return train_adapter(tokens, self.tokenizer, folder, rate=rate, seed=setting.seed, steps=steps)

    def mean_loss(self, arm: Arm, tasks: Sequence[Task]) -> float:
        """Return the mean over tasks of the loss on the rows that choices are made on, in nats per token."""
        losses = []
        for index, task in enumerate(tasks):
            rows = self.found(arm, task, index if len(tasks) > 1 else 0, dev=True)
            losses.append(sum(row[0] for row in rows) / sum(row[1] for row in rows))
        return mean(losses)

    def found(self, arm: Arm, task: Task, index: int, dev: bool = False) -> list[list[float]]:
        """Return what an arm does on each row of a task: see ``measured_rows``."""
        return [row for batch in self.batches(task, dev) for row in measured_rows(arm, batch, index)]
