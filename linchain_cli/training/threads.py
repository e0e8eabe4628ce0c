"""CPU threads that follow what other processes leave, without a changed bit."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from linchain_cli.chain import folded
from linchain_cli.machine import SharedCpus
from linchain_cli.training.job import Job


class LoadedCpus:
    """Sets torch's thread count before each optimizer step to what other processes leave of the CPUs.

    A count is taken only after it has given the same gradients, bit for bit, as all threads do on the longest
    and the shortest micro-batch of the step it comes up in: an exact resume must not depend on what else ran.
    Nothing is looked at on a GPU, with several processes, in compiled runs, or where OMP_NUM_THREADS is set.
    The count stays as the last step had it.
    """

    def __init__(self, job: Job, cpus: SharedCpus, note: Callable[[str], None]):
        self._job, self._cpus, self._note = job, cpus, note
        self._exact = {cpus.limit: True}  # whether a count gives the gradients of all threads
        alone = job.device.type == "cpu" and job.accelerator.num_processes == 1
        # Compiled loops have their number of threads written into them.
        self._looks = alone and not job.recipe.training.compile and cpus.limit > 1

    def adjust(self, rows: np.ndarray) -> None:
        """Looks at the load; `rows` are those of the step that follows."""
        if not self._looks or (wanted := self._cpus.look()) == torch.get_num_threads():
            return
        if wanted not in self._exact:
            self._exact[wanted] = self._same_gradients(wanted, rows)
            how = "while they do" if self._exact[wanted] else "would round differently: none is given up"
            self._note(f"other processes use the CPUs: {wanted} of {self._cpus.limit} threads {how}")
        if self._exact[wanted]:
            torch.set_num_threads(wanted)

    def _same_gradients(self, threads: int, rows: np.ndarray) -> bool:
        job = self._job
        parts = job.micro_batches(rows, job.data.train)
        for part in (parts[0], parts[-1]):
            gradients = self._gradients(self._cpus.limit, part)
            if not torch.equal(gradients, self._gradients(threads, part)):
                return False
        return True

    def _gradients(self, threads: int, rows: np.ndarray) -> Tensor:
        job, before = self._job, torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            with folded(job.model):
                batch = job.objective.collate(job.data.train, rows, job.base.pad_id)
                job.objective.add_gradients(job.model, batch, 1.0, job.device)
            return job.optimizer.sums.clone()
        finally:
            job.optimizer.zero_grad()
            torch.set_num_threads(before)
