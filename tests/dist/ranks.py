"""Processes with a Gloo group between them, for tests: each runs one function, and the first failure is the test's."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import start_processes

import lsmc.models

LIMIT = datetime.timedelta(seconds=120)


def run(function: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """`function(*args)` in `world` processes, which find each other through a file in `folder`."""
    start_processes(_start, (function, world, f"{folder}/store", args), nprocs=world, start_method="spawn")


def _start(rank: int, function: Callable[..., None], world: int, store: str, args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world, timeout=LIMIT)
    torch.manual_seed(0)
    try:
        function(*args)
        dist.barrier()
    finally:
        dist.destroy_process_group()
