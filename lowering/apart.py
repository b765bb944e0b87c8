"""Work that may crash or hang, done in processes of its own: what breaks takes down its process, and is named.

    for job, result in apart(work, jobs, count=4, limit=60):  →  a result, or a `Failure` that says why there is none
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

GRACE = 10.0
"""Seconds that a killed process may take to go: a driver may hold it."""
STARTS = 3
"""Workers in a row that may end before their first job."""


@dataclass(frozen=True)
class Failure:
    """Why a job has no result."""

    reason: str


@dataclass
class _Worker:
    process: BaseProcess
    job: Any = None
    since: float | None = None
    """When its job began; None while it starts."""


def apart(work: Callable[[Job], Result], jobs: Sequence[Job], count: int, limit: float,
          until: float = float("inf")) -> Iterator[tuple[Job, Result | Failure]]:
    """Every job with its result or `Failure`, as they end.

    work     a function at the top level of a module other than the script that runs, called in up to `count` fresh processes, a
             job at a time; what it raises ends its process, a `Failure` that it returns does not
    limit    seconds after which a job is killed; until: the time (`time.monotonic`) after which none begins or goes on,
             and what has no result yet is left out

    Raises RuntimeError where processes cannot start.
    """
    context, waiting = get_context("spawn"), list(reversed(jobs))
    workers: dict[Connection, _Worker] = {}
    stillborn = 0
    try:
        while (waiting or any(w.job is not None for w in workers.values())) and time.monotonic() < until:
            while len(workers) < count and len(workers) - sum(w.job is not None for w in workers.values()) < len(waiting):
                here, there = context.Pipe()
                process = context.Process(target=_serve, args=(work, there), daemon=True)
                with _nameless():
                    process.start()
                there.close()
                workers[here] = _Worker(process)
            for pipe in connection.wait(list(workers), timeout=0.2):
                assert isinstance(pipe, Connection)
                worker = workers[pipe]
                try:
                    message = pipe.recv()
                except (EOFError, OSError):
                    worker.process.join()
                    del workers[pipe]
                    if worker.since is None:
                        stillborn += 1
                        if stillborn >= STARTS:
                            raise RuntimeError(f"worker processes end before they begin ({_ended(worker.process)})") from None
                    elif worker.job is not None:
                        yield worker.job, Failure(_ended(worker.process))
                    continue
                stillborn = 0
                job, worker.job, worker.since = worker.job, None, time.monotonic()
                result, alive = message
                if waiting and alive:
                    worker.job = waiting.pop()
                    pipe.send(worker.job)
                if job is not None:
                    yield job, result
            for pipe, worker in list(workers.items()):
                if worker.job is not None and worker.since is not None and time.monotonic() - worker.since > limit:
                    del workers[pipe]
                    worker.process.kill()
                    worker.process.join(GRACE)
                    yield worker.job, Failure(f"no end after {limit:.0f} s")
    finally:
        for worker in workers.values():
            worker.process.kill()
        for worker in workers.values():
            worker.process.join(GRACE)


@contextmanager
def _nameless() -> Iterator[None]:
    """Start processes as from a prompt: they would otherwise run the script again that called, from its top."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _ended(process: BaseProcess) -> str:
    code = process.exitcode or 0
    return f"its process died of {signal.Signals(-code).name}" if code < 0 else f"its process ended with status {code}"


def _serve(work: Callable[[Any], Any], pipe: Connection) -> None:
    """A worker: says that it is there, then answers jobs. It ends with the first that fails: the device may be broken."""
    pipe.send((None, True))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = work(job)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            pipe.send((Failure(f"{type(error).__name__}: {lines[0][:300]}"), False))
            os._exit(1)
        pipe.send((result, True))
