"""Processes with a Gloo group between them, for tests: each runs one function, and its first failure is the test's."""

from __future__ import annotations

import datetime
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function: Callable[..., None], world: int, folder: Path, *args: Any) -> None:
    """`function(*args)` in `world` processes; they find each other through a file in `folder`."""
    mp.start_processes(_start, (function, world, str(folder), args), nprocs=world, start_method="spawn")


def _start(rank: int, function: Callable[..., None], world: int, folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=datetime.timedelta(seconds=60))
    try:
        function(*args)
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
