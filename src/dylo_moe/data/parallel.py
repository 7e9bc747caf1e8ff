"""Work on many rows: in several processes, in chunks that are kept, so that what is done once is not done again."""

from collections.abc import Callable
from typing import Any

from datasets import Dataset, Features, concatenate_datasets
from datasets.fingerprint import Hasher

ROWS_PER_CHUNK = 50_000
"""A run that is interrupted does at most so many rows again."""

ROWS_PER_WORKER = 5_000
"""With fewer rows, starting a process costs more than it saves."""

Batch = dict[str, Any]


def map_rows(
    rows: Dataset, function: Callable[[Batch], Batch], key: str, *, features: Features, workers: int, title: str
) -> Dataset:
    """Applies a function to batches of rows, and keeps what it gives on the disk.

    Args:
        rows: The input.
        function: From the columns of a batch to the columns of ``features``, a row for each row.
        key: Tells this input and this function from others: with the same key, the kept rows are taken.
        features: Columns of the output.
        workers: Processes, at most.
        title: For the progress bar.

    Returns:
        The output, mapped into memory.
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
