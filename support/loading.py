"""The steps of a run, prepared ahead by worker processes."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader


def load(dataset, steps, batch: int, workers: int, rank: int = 0,
         world_size: int = 1) -> Iterator[list[list]]:
    """The micro-batches of each step, prepared ahead by `workers` processes.

    dataset: data.Trajectories. steps: the rows of each step. Raises ValueError or OSError for a
    faulty record, and where --skip_bad would leave out more than 1% of the records.
    """
    def collate_step(rows: list[int]):
        try:
            result = dataset.micro_batches(rows, batch, rank, world_size)
        except (ValueError, OSError) as error:  # a faulty record: its sentence, and no traceback
            result = error
        return result, dataset.faults

    # the generator is the loader's own: it must not draw from the one that dropout uses
    loader = DataLoader(range(len(dataset)), batch_sampler=steps, collate_fn=collate_step,
                        num_workers=workers, pin_memory=torch.cuda.is_available(),
                        generator=torch.Generator(),
                        multiprocessing_context="fork" if workers else None)
    for result, faults in loader:
        dataset.faults |= faults  # each worker has its own
        if isinstance(result, Exception):
            raise result
        if len(dataset.faults) > len(dataset) / 100:
            raise ValueError(f"{len(dataset.faults)} of {len(dataset)} records are faulty, and "
                             f"--skip_bad leaves out 1%, the last one: {[*faults.values()][-1]}")
        yield result
