"""Time every kernel of some methods under many plans: `python tests/gpu/sweep.py --methods gla,kda [--chunks 64,128]`.

Compiles all candidates in parallel processes first, then times each alone, by CUDA events around a captured graph.
Prints, for each kernel, the best few plans; nothing is compared with a reference here (`run_h200.py` does that).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from queue import Empty
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("LSMC_CACHE", "/tmp/lsmc-cache")

import torch

from lsmc.pipeline import TYPICAL
from tests.gpu.run_h200 import candidates, milliseconds, prepare

SHAPES = {"large": (16, 4096, 8), "paper": (8, 2048, 8), "long": (1, 16384, 8), "tiny": (1, 256, 1)}


@cache
def prepared(name: str, schedule: str, chunk: int, shape: str) -> dict[str, tuple[Any, Any]]:
    """Every kernel of a method by name, with a launch whose buffers exist."""
    launches = prepare(name, schedule, SHAPES[shape], chunk, run=False, planned=TYPICAL).kernels
    return {k.name: (launch, k) for launch, k in launches}


def compile_one(job: tuple[str, str, int, str, dict[str, int]]) -> str:
    name, schedule, chunk, kernel, plan = job
    run, k = prepared(name, schedule, chunk, "tiny")[kernel]
    run.plans = {k.kernel.name: plan}
    try:
        programs, args = run.arguments(k)
        made = run.compiled.functions[k.name].warmup(grid=(programs,), **args)
        if made.metadata.shared > 232448:
            return f"{job}: {made.metadata.shared} bytes of shared memory"
    except Exception as e:
        return f"{job}: {str(e)[-120:]}"
    return ""


def time_all(group: list[tuple[str, str, int, str, dict[str, int]]], shape: str, results: Any) -> None:
    """Puts the times of candidates, one by one: what was measured before a crash is kept."""
    for name, schedule, chunk, kernel, plan in group:
        run, k = prepared(name, schedule, chunk, shape)[kernel]
        run.plans = {k.kernel.name: plan}
        programs, args = run.arguments(k)  # outside of the graph, whose memory goes with it
        function = run.compiled.functions[k.name][(programs,)]
        try:
            results.put(milliseconds(lambda function=function, args=args: function(**args), 5))
        except torch.AcceleratorError:
            os._exit(1)  # named by who waits for the result


def time_apart(group: list[tuple[str, str, int, str, dict[str, int]]], shape: str, until: float) -> list[Any]:
    """The times of candidates in processes of their own: one that breaks the device is named, the rest goes on."""
    rows, context = [], get_context("spawn")
    while group and time.time() < until:
        results = context.Queue()
        worker = context.Process(target=time_all, args=(group, shape, results))
        worker.start()
        while group:
            try:
                took = results.get(timeout=1)
            except Empty:
                if worker.is_alive() and time.time() < until:
                    continue
                break
            rows.append((shape, *group[0][:4], took, group[0][4]))
            group = group[1:]
        worker.kill()
        worker.join()
        if group and time.time() < until:
            print("broke the device:", *group[0])
            group = group[1:]
    return rows


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--methods", default="bla,retnet,gla,gated_deltanet,kda,rwkv6")
    p.add_argument("--schedules", default="fused,two_pass")
    p.add_argument("--chunks", default="64")
    p.add_argument("--shapes", default="large,paper")
    p.add_argument("--only", default="", help="kernels whose names contain one of these words")
    p.add_argument("--seconds", type=float, default=300)
    p.add_argument("--out", default="sweep.json")
    a = p.parse_args()
    begin = time.time()
    jobs = []
    for name, schedule, chunk in itertools.product(a.methods.split(","), a.schedules.split(","), map(int, a.chunks.split(","))):
        for kernel, (_, k) in prepared(name, schedule, chunk, "tiny").items():
            if any(word in kernel for word in a.only.split(",")):
                jobs += [(name, schedule, chunk, kernel, plan) for plan in candidates(k)]
    failed, done = [], set()
    with ProcessPoolExecutor(15, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compile_one, j): i for i, j in enumerate(jobs)}
        try:
            for f in as_completed(futures, timeout=a.seconds / 2):
                if f.result():
                    failed.append(f.result())
                else:
                    done.add(futures[f])
        except TimeoutError:
            print("compiling stopped at the limit")
            for process in pool._processes.values():
                process.kill()
    print(f"{len(done)} of {len(jobs)} compiled in {time.time() - begin:.0f} s; failed: {len(failed)}", *failed[:4], sep="\n")
    rows = []
    good = [j for i, j in enumerate(jobs) if i in done]
    for shape in a.shapes.split(","):
        for _, group in itertools.groupby(good, key=lambda j: j[0]):
            rows += time_apart(list(group), shape, begin + a.seconds)
    rows.sort(key=lambda r: (r[0], r[1], r[2], r[3]))
    Path(a.out).write_text(json.dumps(rows))
    total: dict[tuple[str, str, str, int], list[float]] = {}
    for key, group in itertools.groupby(rows, key=lambda r: r[:5]):
        best = sorted(group, key=lambda r: r[5])
        total.setdefault(key[:4], []).append(best[0][5])
        text = " | ".join(f"{r[5]:.3f} " + " ".join(f"{n.removeprefix('num_')}{v}" for n, v in r[6].items()) for r in best[:4])
        print(*key[:1], key[4], key[3], "|", text, f"| worst {best[-1][5]:.3f}")
    for key, times in total.items():
        print(*key, f"sum of the best {sum(times):.3f} ms")
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
