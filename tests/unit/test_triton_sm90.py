"""The generated kernels fit a Hopper GPU: compiled for sm_90a without one, in processes of their own.

Every schedule that the cost model picks for some shape is compiled, so that no default meets a kernel that cannot launch.
The table at the end of the run says what each kernel takes.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from lsmc import zoo
from lsmc.adjoint import differentiate
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.lowering.plan import able, ranking
from lsmc.pipeline import CHUNK, Options, compile_plan
from lsmc.schedules import CUTS, Shape, choose
from lsmc.target import H200

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

METHODS = tuple(m.name for m in zoo.METHODS if able("triton", derive(m.canonical)) == "triton")
DIRECTIONS = ("forward", "backward")
SLOW = {("kda", "backward"), ("gated_deltanet", "backward")}
"""Their largest kernels take ptxas half a minute: without --slow, only the schedule of the typical shape is compiled."""
SEGMENTS = {("gla", "backward"), ("deltanet", "backward")}
"""Whose scans in segments are compiled without --slow: one of each way to combine them, with all that their forwards have."""


def chosen(name: str, direction: str) -> list[str]:
    """The schedules that are chosen for one shape or another; that of the typical shape first."""
    forward = derive(getattr(zoo, name).canonical, 1.0)
    program = hoist(forward if direction == "forward" else differentiate(forward))
    shapes = [Shape(64, 4096, 128, 128, CHUNK)]
    shapes += [Shape(s, t, 128, 128, CHUNK) for s, t in itertools.product((1, 16, 128, 1024), (64, 2048, 65536))]
    return list(dict.fromkeys(choose(program, tuple(CUTS.values()), s, rank=ranking("triton")).schedule.name for s in shapes))


def measure(name: str, direction: str, schedule: str, dtype: str) -> list[Any]:
    """What every kernel takes; of scans in segments only these, others have the rest. Runs in a process without the interpreter."""
    from lsmc.lowering.offline import resources

    plan = compile_plan(getattr(zoo, name).canonical, Options(schedule=schedule, target="triton"))
    executable: Any = getattr(plan, direction).executable
    parts = tuple(k for k in executable.kernels if k.kernel.part)
    executable.kernels = parts or executable.kernels
    return resources(executable, key=128, value=128, chunk=CHUNK, dtype=dtype)


class Compiles:
    """Measurements that run side by side, each once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self.pool, self.futures = pool, dict[tuple[str, ...], Future[list[Any]]]()

    def table(self) -> list[str]:
        """One line per kernel of the runs that ended well."""
        done = {what: f.result() for what, f in self.futures.items() if f.done() and not f.cancelled() and not f.exception()}
        return [f"    {schedule:<9} {dtype} {r}" for (_, _, schedule, dtype), found in sorted(done.items()) for r in found]

    def start(self, *what: str) -> Future[list[Any]]:
        if what not in self.futures:
            self.futures[what] = self.pool.submit(measure, *what)
        return self.futures[what]


@pytest.fixture(scope="module")
def compiles(request: pytest.FixtureRequest) -> Iterator[Compiles]:
    wanted = [i.callspec.params for i in request.session.items  # type: ignore[attr-defined]
              if getattr(i, "module", None) is request.module and hasattr(i, "callspec") and not i.get_closest_marker("skip")]
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        made = Compiles(pool)
        for p in sorted(wanted, key=lambda p: (p["name"], p["direction"]) not in SLOW):  # the longest first
            made.start(p["name"], p["direction"], p["schedule"], p["dtype"])
        yield made
        pool.shutdown(cancel_futures=True)
    plugins = request.config.pluginmanager
    report, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if report is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            report.ensure_newline()
            for line in made.table():
                report.write_line(line)


def _cases() -> list[Any]:
    out = []
    for name, direction in itertools.product(METHODS, DIRECTIONS):
        for n, schedule in enumerate(chosen(name, direction)):
            segments = "segments" in schedule
            rare = (name, direction) in SLOW or segments and not (schedule == "segments" and (name, direction) in SEGMENTS)
            slow = [pytest.mark.slow] * (n > 0 and rare)
            out.append(pytest.param(name, direction, schedule, "bf16", marks=slow, id=f"{name}-{direction}-{schedule}"))
    return out


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "direction", "schedule", "dtype"), _cases())
def test_kernels_that_are_chosen_by_default_fit_the_gpu(
        compiles: Compiles, record_property: Any, name: str, direction: str, schedule: str, dtype: str) -> None:
    """Shared memory of one block, registers of one thread; spills are recorded."""
    found = compiles.start(name, direction, schedule, dtype).result()
    for r in found:
        record_property(r.kernel, str(r))
    over = [str(r) for r in found if r.shared > H200.shared_bytes or r.registers > 255]
    assert not over, f"cannot launch: {over}"
    assert any(r.wgmma for r in found), "bfloat16 products belong on the matrix units"


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "direction", "schedule", "dtype"),
                         [pytest.param(n, d, chosen(n, d)[0], "fp32", id=f"{n}-{d}") for n in METHODS for d in DIRECTIONS])
def test_float32_kernels_fit_the_gpu(compiles: Compiles, name: str, direction: str, schedule: str, dtype: str) -> None:
    over = [str(r) for r in compiles.start(name, direction, schedule, dtype).result() if r.shared > H200.shared_bytes]
    assert not over, f"cannot launch: {over}"
