"""Functions over many rows, in several processes and in chunks that are cached on the disk."""

from collections.abc import Callable, Mapping

from datasets import Dataset, Features, concatenate_datasets
from datasets.fingerprint import Hasher

ROWS_PER_CHUNK = 50_000
"""Most rows that an interrupted run has to process again."""

ROWS_PER_WORKER = 5_000
"""Fewest rows for which starting a process pays."""


def map_rows(
    rows: Dataset,
    function: Callable[[dict[str, list[str]]], Mapping[str, object]],
    key: str,
    *,
    features: Features,
    workers: int,
    title: str,
) -> Dataset:
    """Apply a function to batches of rows and cache its output on the disk.

    Args:
        rows: The input.
        function: Takes the text columns of a batch and returns the columns of ``features``, one row for each row.
        key: Identity of the input and the function; output cached under the same key is reused.
        features: Columns of the output.
        workers: Largest number of processes.
        title: Title of the progress bar.

    Returns:
        The output, memory-mapped.
    """
    done = []
    for number, start in enumerate(range(0, max(1, len(rows)), ROWS_PER_CHUNK)):
        end = min(start + ROWS_PER_CHUNK, len(rows))
        processes = min(workers, (end - start) // ROWS_PER_WORKER)
        done.append(
            rows.select(range(start, end)).map(
                function,
                batched=True,
                remove_columns=rows.column_names,
                features=features,
                num_proc=processes if processes > 1 else None,
                new_fingerprint=Hasher.hash([key, number, ROWS_PER_CHUNK]),
                desc=title,
            )
        )
    return concatenate_datasets(done)
