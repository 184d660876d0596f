"""Real gloo process groups for tests: started once a world size, and quick to fail.

A rank that raised leaves the others waiting in a collective, so the first failure ends the whole group.
"""

import os
import tempfile
import time
import traceback
from multiprocessing import get_context
from multiprocessing.connection import wait
from pathlib import Path

START_UP_S = 120


class WorkerFailed(AssertionError):
    """A function raised on some rank, or the ranks took too long; the group is gone."""


class ProcessGroup:
    """`world` processes that stay; `run(function, ...)` calls `function(rank, world, ...)` on all of them at once.

    Functions and arguments are pickled by name, so they must lie in importable modules.
    """

    def __init__(self, world):
        self.world, self.processes, self.pipes = world, [], []
        self.folder = tempfile.TemporaryDirectory(prefix="shear-group-")

    def start(self):
        context = get_context("spawn")
        store = Path(self.folder.name) / f"store-{time.time_ns()}"
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)
        self._answers(START_UP_S)

    def run(self, function, *args, timeout_s=120, **kwargs):
        """What the function returned, a list with one entry a rank."""
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        return self._answers(timeout_s)

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(timeout=10)
        self.processes, self.pipes = [], []

    def _answers(self, timeout_s):
        answers, deadline = {}, time.monotonic() + timeout_s
        while len(answers) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                self._fail(f"ranks {sorted(set(range(self.world)) - set(answers))} gave no answer in {timeout_s} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)
                try:
                    failure, answers[rank] = pipe.recv()
                except EOFError:
                    self._fail(f"rank {rank} died")
                if failure:
                    self._fail(f"rank {rank} of {self.world} raised\n{failure}")
        return [answers[rank] for rank in range(self.world)]

    def _fail(self, message):
        self.close()
        raise WorkerFailed(message)


def _serve(rank, world, store, pipe):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TRANSFORMERS_VERBOSITY": "error"}
    try:
        import torch
        import torch.distributed as dist

        from shearing.training.engine import prepare_deepspeed

        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        prepare_deepspeed()
        pipe.send(("", None))
        while True:
            function, args, kwargs = pipe.recv()
            pipe.send(("", function(rank, world, *args, **kwargs)))
    except EOFError:  # the tests are over
        pass
    except BaseException:
        pipe.send((traceback.format_exc(), None))
    os._exit(0)
