"""The generated kernels fit a Hopper GPU: compiled for sm_90a without one, in processes of their own.

What the cost model picks for the typical shape is compiled, and with --slow every schedule, so that no default meets a kernel
that cannot launch.
The table at the end of the run says what each kernel takes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import pytest

from lsmc import zoo
from lsmc.chunk import derive
from lsmc.lowering.plan import able
from lsmc.pipeline import Options, compile_plan
from lsmc.schedules import CUTS
from lsmc.target import H200

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")

METHODS = tuple(m.name for m in zoo.METHODS if able("triton", derive(m.canonical)) == "triton")
WALKS = tuple(n for n in METHODS if getattr(zoo, n).canonical.matrix)
"""Whose kernels go from token to token: few states for each of many channels, no products of tiles."""
SLOW = ("kda", "gated_deltanet")
"""Their largest kernels take ptxas half a minute: these come first."""
RARE = ("titans", "titans_plain", "gfw", "gateloop", "gateloop_real", "s4", "s4_complex", "gfw_full", "ttt_ln", "ttt_ln_sequential", "rebased")
"""Left to --slow: variants, and what takes ptxas long."""
STEPS = ("kda",)
"""Whose steps are compiled without --slow."""
SEGMENTS = ("deltanet",)
"""Whose scans in segments are compiled without --slow: one of each way to combine them."""


def measure(name: str, direction: str, schedule: str, dtype: str) -> list[Any]:
    """What every kernel takes; of a schedule in segments only their scans, others have the rest. Not with the interpreter."""
    from lsmc.lowering.offline import resources

    plan = compile_plan(getattr(zoo, name).canonical, Options(schedule=None if schedule == "chosen" else schedule, target="triton",
                                                                 fresh=schedule != "walk"))
    executable: Any = getattr(plan, direction).executable
    if "segments" in schedule:
        executable.kernels = tuple(k for k in executable.kernels if k.kernel.part) or executable.kernels
    key, value = (16, 2048) if name in WALKS else (128, 128)
    return resources(executable, key=key, value=value, chunk=plan.chunk, dtype=dtype)


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
        for p in sorted(wanted, key=lambda p: p["name"] not in SLOW):  # the longest first
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
    """What training runs at the typical shape; with --slow, every schedule, and the forward that keeps nothing."""
    out = [(name, direction, "chosen", [pytest.mark.slow] * (name in RARE)) for name in METHODS
           for direction in ("training", "backward")]
    out += [(name, direction, "segments", ()) for name in SEGMENTS for direction in ("training", "backward")]
    out += [(name, direction, schedule, [pytest.mark.slow]) for name in METHODS for schedule in CUTS
            for direction in ("forward", "training", "backward")
            if direction == "forward" or schedule != "segments" or name not in SEGMENTS]
    return [pytest.param(*case, "bf16", marks=marks, id="-".join(case)) for *case, marks in out]


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
    assert any(r.wgmma for r in found) or name in WALKS or schedule == "walk", "bfloat16 products belong on the matrix units"
    spilled = any(r.spills > 256 for r in found) and name in WALKS and schedule == "chosen"
    assert not spilled, "memories of a group of tokens fit into registers"
    slow = [str(r) for r in found if r.serial and r.serial != "insufficient register resources"]
    assert not slow or schedule != "chosen", f"products wait for one another: {slow}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "direction", "schedule", "dtype"),
                         [pytest.param(n, "forward", "walk", "bf16", id=n, marks=[pytest.mark.slow] * (n not in STEPS))
                          for n in METHODS if getattr(zoo, n).canonical.rows == "K"])
def test_a_step_holds_its_memories_in_registers(compiles: Compiles, name: str, direction: str, schedule: str, dtype: str) -> None:
    """One kernel without spills, of which a multiprocessor holds two or more; one, if it has all columns."""
    (r,) = compiles.start(name, direction, schedule, dtype).result()
    assert r.spills == 0 and r.registers * r.warps <= (1024 if r.warps < 16 else 2048) and r.shared <= H200.shared_bytes // 2, str(r)


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("name", "direction", "schedule", "dtype"),
                         [pytest.param(n, d, "chosen", "fp32", id=f"{n}-{d}") for n in METHODS for d in ("training", "backward")])
def test_float32_kernels_fit_the_gpu(compiles: Compiles, name: str, direction: str, schedule: str, dtype: str) -> None:
    over = [str(r) for r in compiles.start(name, direction, schedule, dtype).result() if r.shared > H200.shared_bytes]
    assert not over, f"cannot launch: {over}"
