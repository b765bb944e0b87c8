"""The processes of a run: those that torchrun started, as a mesh; what they agree on; who keeps the others waiting.

    torchrun --nproc-per-node 4 -m lsmc train --mesh dp=2,sp=2

All processes take the same steps in the same order. Each says where it is (`at`) in the store that torchrun keeps. One
that gets no further for `timeout` seconds looks up where the others are, names those that are behind, and ends, so that
nothing waits for ever; torchrun then ends the rest. A process that dies is named by torchrun at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch

from lsmc.errors import LsmError
from lsmc.runtime.errors import LsmConfigError, LsmTrainingError
from lsmc.runtime.mesh import sizes

Sign = tuple[int, int, str]
"""Signs of life so far, places so far, and what the last place is."""

_SLACK = 60.0
"""Seconds after `timeout` at which torch's own timeouts end what this module has not ended."""


class Ranks:
    """This process among those of a run; alone where `mesh` is empty.

    mesh     sizes of the axes, as in "dp=2,sp=2"; their product is the number of processes
    timeout  seconds in which a process must get from one place in its work to the next
    """

    def __init__(self, mesh: str, device: torch.device, timeout: float) -> None:
        self.sizes, self.timeout, self.device = sizes(mesh, "TrainConfig.mesh") if mesh else {}, timeout, device
        self.count = math.prod(self.sizes.values())
        self.rank, self._pause = 0, min(1.0, timeout / 10)
        self.stop, self.place = threading.Event(), (0, "the start")
        self.mesh: Any = None
        if not mesh:
            return
        found = os.environ.get("WORLD_SIZE")
        if found is None or int(found) != self.count or "RANK" not in os.environ:
            raise LsmConfigError(
                f"TrainConfig.mesh = {mesh!r} takes {self.count} processes, and this is one of {found or 1}\n"
                f"help: torchrun --nproc-per-node {self.count} -m lsmc train … --mesh {mesh}"
            )
        self.rank = int(os.environ["RANK"])
        if device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)

    @property
    def first(self) -> bool:
        """Whether this process writes what the run leaves behind."""
        return self.rank == 0

    def __enter__(self) -> Ranks:
        if not self.sizes:
            return self
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        limit = timedelta(seconds=self.timeout + _SLACK)
        store, rank, count = next(rendezvous("env://", timeout=limit))
        self.store = PrefixStore(f"lsmc/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        # Watched from here on: processes that never come are missing too.
        self.watcher = threading.Thread(target=self._watch, daemon=True)
        self.watcher.start()
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=limit)
        self.mesh = init_device_mesh(self.device.type, tuple(self.sizes.values()), mesh_dim_names=tuple(self.sizes))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop.set()
        if self.sizes and kind is None:
            import torch.distributed as dist

            self.watcher.join()
            dist.destroy_process_group()

    # -- agreement

    def largest(self, *numbers: float) -> Sequence[float]:
        """The largest of each number over all processes."""
        if self.mesh is None:
            return numbers
        import torch.distributed as dist

        x = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.tolist()

    # -- the watch

    @contextlib.contextmanager
    def naming(self) -> Iterator[None]:
        """What torch reports of a collective that failed, with the ranks that answer no more."""
        try:
            yield
        except RuntimeError as error:
            if self.mesh is None or isinstance(error, LsmError):
                raise
            before = self._others()
            time.sleep(3 * self._pause)
            why = self._silent(before, self._others())
            raise LsmTrainingError(f"rank {self.rank} failed at {self.place[1]}: {why or error}") from error

    def at(self, what: str) -> None:
        """Say that this process begins something that all of them begin in the same order."""
        self.place = (self.place[0] + 1, what)

    def _watch(self) -> None:
        signs = 0
        since, seen = time.monotonic(), self.place
        half: dict[int, Sign] = {}
        while not self.stop.wait(self._pause):
            signs += 1
            now, place = time.monotonic(), self.place
            try:
                self.store.set(str(self.rank), f"{signs} {place[0]} {place[1]}")
                if place != seen:
                    since, seen, half = now, place, {}
                elif now - since > self.timeout:
                    self._end(self._behind(half))
                elif now - since > self.timeout / 2 and not half:
                    half = self._others()
            except RuntimeError as error:  # the store is gone, and so is who kept it
                if not self.stop.is_set():
                    self._end(f"the store of the run does not answer: {str(error).splitlines()[0]}")

    def _others(self) -> dict[int, Sign]:
        found = {}
        for rank in range(self.count):
            if self.store.check([str(rank)]):
                signs, number, what = self.store.get(str(rank)).decode().split(" ", 2)
                found[rank] = int(signs), int(number), what
        return found

    def _behind(self, before: dict[int, Sign]) -> str:
        """Who gives no sign of life; if all do, who has come least far."""
        now = self._others()
        if why := self._silent(before, now):
            return why
        least = min(number for _, number, _ in now.values())
        return "; ".join(f"rank {r} is still at {what}" for r, (_, n, what) in now.items() if n == least)

    def _silent(self, before: Mapping[int, Sign], now: Mapping[int, Sign]) -> str:
        silent = [r for r in range(self.count) if r not in now or (r in before and now[r][0] == before[r][0])]
        where = {r: f"last seen at {now[r][2]}" if r in now else "it never began" for r in silent}
        return "; ".join(f"rank {r} does not answer ({where[r]})" for r in silent)

    def _end(self, why: str) -> None:
        sys.stderr.write(f"lsmc.LsmTrainingError: rank {self.rank} has waited {self.timeout:g} s at {self.place[1]}: {why}\n")
        sys.stderr.flush()
        os._exit(1)  # the main thread stands in a collective, where no exception reaches it


__all__ = ["Ranks"]
