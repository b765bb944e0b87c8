"""The tuner: what is wrong, crashes or hangs is never chosen nor tried again; the cache, its keys, and look-up at launch."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")

import lsmc
from lsmc import cli, zoo
from lsmc.lowering.apart import Failure, apart
from lsmc.lowering.tune import COLUMNS, MARGIN, MOST, Candidate, best, candidates, defaults, sift
from lsmc.lowering.tuned import store
from lsmc.lowering.tuned.store import Entry, Like, Machine, Rejected, Time
from lsmc.pipeline import Options, compile_plan
from lsmc.runtime import trials, tuning
from lsmc.runtime.errors import LsmConfigError
from lsmc.schedules import Shape
from tests.interpreted import workers

HERE = Machine("sm_90", "NVIDIA H200", "2.13.0", "3.6.0", "12.8.93")
LIKE = Like("abc", 128, 4096, 128, 128, 64, "bfloat16 bfloat16 bfloat16")
PLAN = {"BK": 128, "BV": 32, "num_warps": 4, "num_stages": 3}
BAD = Rejected("scan", {**PLAN, "BV": 64}, "wrong: o is off by 1")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test alone, and no shipped tables."""
    monkeypatch.setenv("LSMC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    store.find.cache_clear()
    store.shipped.cache_clear()
    yield tmp_path / "cache" / "tuned"
    store.find.cache_clear()
    store.shipped.cache_clear()


def entry(**changes: Any) -> Entry:
    made = Entry(LIKE, HERE, {"scan": PLAN}, {"scan": Time(0.5, 0.75, 0.6)}, (BAD,))
    return dataclasses.replace(made, **changes)


# -- processes that may break -----------------------------------------------------------------------------------------


def fragile(job: str) -> Any:
    match job.split():
        case ["crash"]:
            os.kill(os.getpid(), signal.SIGKILL)
        case ["exit"]:
            os._exit(3)
        case ["hang"]:
            time.sleep(600)
        case ["raise"]:
            raise ValueError("wrong number\nand more")
        case ["refuse"]:
            return Failure("too large")
    return os.getpid()


def test_a_job_that_breaks_or_hangs_takes_down_its_process_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lsmc.lowering.apart.get_context", lambda method: get_context("fork"))  # these start at once
    jobs = ["well 1", "crash", "well 2", "hang", "exit", "well 3", "raise", "refuse", "well 4"]
    seen = dict(apart(fragile, jobs, count=2, limit=4))
    assert set(seen) == set(jobs)
    reasons = {job: result.reason for job, result in seen.items() if isinstance(result, Failure)}
    assert reasons == {
        "crash": "its process died of SIGKILL", "hang": "no end after 4 s", "exit": "its process ended with status 3",
        "raise": "ValueError: wrong number", "refuse": "too large",
    }


def test_work_stops_when_time_is_up() -> None:
    begin = time.monotonic()
    assert list(apart(fragile, ["hang", "well"], count=1, limit=600, until=begin + 0.3)) == []
    assert time.monotonic() - begin < 60


# -- selection --------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(0, 9), st.sampled_from(["right", "wrong", "hangs", "late"]), min_size=1))
def test_only_what_passes_every_stage_is_timed_and_the_rest_is_named(fates: dict[int, str]) -> None:
    def check(tried: Sequence[int]) -> Iterator[tuple[int, Any]]:
        for n in reversed(tried):  # results come in any order
            if fates[n] != "late":
                yield n, None if fates[n] == "right" else Failure(fates[n])

    def measure(tried: Sequence[int]) -> Iterator[tuple[int, Any]]:
        assert all(fates[n] == "right" for n in tried)
        yield from ((n, 1.0 + n) for n in tried)

    named: dict[int, str] = {}
    times = sift(fates, [check, measure], named.__setitem__)
    assert list(times.items()) == [(n, 1.0 + n) for n in fates if fates[n] == "right"]
    assert named == {n: fate for n, fate in fates.items() if fate in ("wrong", "hangs")}


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=6), st.integers(0, 6))
def test_the_fastest_is_chosen_but_for_noise(times: list[float], default: int) -> None:
    found = {Candidate.of("scan", {"BK": n + 1}): t for n, t in enumerate(times)}
    usual = Candidate.of("scan", {"BK": default + 1})  # perhaps rejected
    chosen = best(found, usual)
    if usual in found:
        assert found[chosen] <= found[usual]
        assert (chosen == usual) == (min(times) > MARGIN * found[usual])
    if chosen != usual:
        assert chosen == min(found, key=lambda c: (found[c], c))


def test_a_method_without_kernels_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("from lsmc import LSM, M, k, outer, pairs, q, v\n"
                                     "own = LSM('own', update=outer(pairs(k), v - pairs(k) @ M), readout=pairs(q) @ M)\n")
    with pytest.raises(LsmConfigError, match="own.py:own: has no kernels"):
        tuning.run([f"{tmp_path}/own.py:own"], dry_run=True)


@pytest.mark.parametrize("name", [name for name in zoo.names() if tuning._has_kernels(name)])
@pytest.mark.parametrize("shape", [Shape(128, 4096, 128, 128), Shape(8, 16384, 64, 96), Shape(4, 64, 16, 8)], ids=str)
def test_candidates_are_few_valid_and_begin_with_the_default(name: str, shape: Shape) -> None:
    plan = compile_plan(getattr(zoo, name).canonical, Options(target="triton"), shape)
    for direction in (plan.forward, plan.training, plan.backward):
        made: Any = direction.executable
        found, usual = candidates(made, shape), defaults(made, shape)
        assert set(found) == {k.kernel.name for k in made.kernels}
        for kernel, tried in found.items():
            first, *others = tried
            assert first.plan == usual[kernel]
            assert len(others) < MOST
            for c in others:
                changed = {n for n, x in c.plan.items() if x != usual[kernel].get(n)}
                assert changed
                split = f"B{next(k.split for k in made.kernels if k.kernel.name == kernel)}"
                assert changed <= {split, "AHEAD", "EARLY", "maxnreg", "num_warps", "num_stages"}
                assert "maxnreg" not in changed or c.plan["num_warps"] == 4 and not next(
                    k.scan for k in made.kernels if k.kernel.name == kernel)
                assert split not in changed or c.plan[split] in COLUMNS


# -- what counts as wrong ---------------------------------------------------------------------------------------------


def test_one_wrong_tile_nan_or_a_wrong_gradient_is_seen_and_rounding_is_not() -> None:
    right = {"o": torch.randn(2, 4096, 4, 32), "d_q": torch.randn(2, 4096, 4, 32), "d_g": 1e-9 * torch.randn(2, 4096, 4)}
    near = {n: x + 2e-3 * x.square().mean().sqrt() * torch.randn_like(x) for n, x in right.items()}

    def said(found: dict[str, torch.Tensor], dtype: str = "bfloat16") -> str:
        return trials.wrong(found, right, {"g"}, dtype, right, 64)

    assert said(near) == ""
    assert "o is off by" in said(near, "float32")
    tile = near["o"].clone()
    tile[1, 64:128, 2] *= 1.3  # 1/512 of the tensor: 1 % of the bound on all of it
    assert said({**near, "o": tile}).startswith("o is off by")
    hole = near["d_q"].clone()
    hole[0, 5, 0, 3] = torch.nan
    assert said({**near, "d_q": hole}).startswith("d_q is off by nan")
    assert said({**near, "d_g": near["d_g"] + 1e-4}) == ""  # it nearly cancels
    assert said({**near, "d_g": near["d_g"] + 1e-1}).startswith("d_g is off by")


# -- the cache --------------------------------------------------------------------------------------------------------


def test_what_is_stored_is_found_in_a_folder_of_its_owner_alone(cache: Path) -> None:
    path = store.save(entry())
    assert path is not None
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    assert store.load(LIKE, HERE) == entry()
    assert store.find(LIKE, HERE) == entry()


def test_what_was_rejected_stays_rejected_and_holds_for_other_numbers_of_sequences() -> None:
    store.reject(LIKE, HERE, BAD)
    store.save(entry(rejected=(), plans={"scan": PLAN, "chunks": PLAN}))
    found = store.load(LIKE, HERE)
    assert found is not None
    assert found.rejected == (BAD,)
    store.reject(LIKE, HERE, Rejected("scan", PLAN, "hangs"))  # the plan goes, others stay
    found = store.load(LIKE, HERE)
    assert found is not None
    assert set(found.plans) == {"chunks"}
    assert store.rejections(dataclasses.replace(LIKE, sequences=8, tokens=64), HERE) == found.rejected
    assert store.rejections(dataclasses.replace(LIKE, key=64), HERE) == ()
    assert store.rejections(LIKE, dataclasses.replace(HERE, ptxas="13.1.80")) == ()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"like": {}}', json.dumps({**dataclasses.asdict(entry()), "plans": {"scan": {"BK": -1}}})])
def test_a_damaged_file_is_named_left_out_and_replaced(text: str) -> None:
    path = store.save(entry())
    assert path is not None
    path.write_text(text)
    store.find.cache_clear()
    with pytest.warns(UserWarning, match=f"{path.name} is ignored"):
        assert store.find(LIKE, HERE) is None
    with pytest.warns(UserWarning, match="is ignored"):
        store.save(entry())
    assert store.find(LIKE, HERE) == entry()


def test_a_file_of_another_key_or_user_or_a_link_is_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = store.save(entry())
    assert path is not None
    other = dataclasses.replace(LIKE, tokens=64)
    path.rename(path.with_name(f"{store.key_of(other, HERE)}.json"))
    with pytest.warns(UserWarning, match="another key"):
        assert store.load(other, HERE) is None
    store.save(entry())
    user = os.getuid()
    with monkeypatch.context() as m:
        m.setattr(store.kernels, "private_dir", lambda part: path.parent)
        m.setattr(os, "getuid", lambda: user + 1)
        with pytest.warns(UserWarning, match="another user"):
            assert store.load(LIKE, HERE) is None
    path.rename(tmp_path / "elsewhere.json")
    path.symlink_to(tmp_path / "elsewhere.json")
    with pytest.warns(UserWarning, match="is ignored"):
        assert store.load(LIKE, HERE) is None


def test_a_folder_of_another_user_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(entry())
    user = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: user + 1)
    assert store.save(entry()) is None
    assert store.load(LIKE, HERE) is None


def write_often(number: int) -> None:
    for _ in range(40):
        store.save(entry(plans={f"kernel{i}": PLAN for i in range(100 * number)}, rejected=()))


def test_ranks_that_write_at_once_leave_a_valid_file(cache: Path) -> None:
    context = get_context("fork")
    ranks = [context.Process(target=write_often, args=(n,)) for n in (1, 2)]
    for rank in ranks:
        rank.start()
    seen = 0
    while any(rank.is_alive() for rank in ranks):
        found = store.load(LIKE, HERE)  # a warning would be an error of this test
        seen += found is not None
        assert found is None or len(found.plans) in (100, 200)
        time.sleep(0.002)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert seen
    assert [path.name for path in cache.iterdir()] == [f"{entry().key}.json"]


@given(st.integers(1, 1 << 20))
def test_sizes_share_a_class_up_to_the_next_power_of_two(n: int) -> None:
    size = store.rounded(n)
    assert size & (size - 1) == 0
    assert n <= size < 2 * n
    assert store.rounded(size) == size


def subject(method: str = "gla", sizes: tuple[int, int, int, int, int] = (2, 64, 2, 32, 32), **changes: Any) -> trials.Subject:
    options = {"dtype": "float32", "gates": "float32", "scale": 1.0, "state": False, "packed": False}
    return trials.Subject(method, (sizes,), **(options | changes))


def keys(made: trials.Subject) -> tuple[str, ...]:
    return tuple(store.key_of(like, HERE) for like in trials.likes(made).values())


def test_a_key_holds_what_decides_code_and_time() -> None:
    """Sequences, length, K, V, types, memories, packing, the program and every version; not more than classes of sizes."""
    base = keys(subject())
    assert keys(subject(sizes=(4, 64, 1, 32, 32))) == base
    assert keys(subject(sizes=(2, 50, 2, 32, 32))) == base
    others = [
        keys(subject(sizes=(3, 64, 2, 32, 32))), keys(subject(sizes=(2, 65, 2, 32, 32))), keys(subject(sizes=(2, 64, 2, 64, 32))),
        keys(subject(sizes=(2, 64, 2, 32, 24))), keys(subject(dtype="float16")), keys(subject(gates="float16")),
        keys(subject(packed=True)), keys(subject(scale=0.5)), keys(subject("retnet")),
    ]
    assert all(not set(base) & set(other) for other in others)
    assert not set(base) & set(keys(subject(state=True))[:1]), "the backward takes memories that the forward kept"
    for change in ({"capability": "sm_100"}, {"name": "other"}, {"torch": "2"}, {"triton": "3.7"}, {"ptxas": "13.1.80"}):
        assert store.key_of(LIKE, dataclasses.replace(HERE, **change)) != store.key_of(LIKE, HERE)


def test_trials_with_typical_gates_take_the_constants_of_the_method() -> None:
    """A scan takes as long as its slowest head: decays that no model has would be what is timed. Other gates vary them as well."""
    made = subject("retnet")
    own = torch.tensor(lsmc.zoo.retnet.canonical.defaults["log_a"](2))
    drawn = {gates: trials.draw(made, (2, 64, 2, 32, 32), gates, "cpu").inputs["log_a"] for gates in ("typical", "mixture")}
    assert torch.equal(drawn["typical"], own) and not torch.equal(drawn["mixture"], own)


# -- look-up ----------------------------------------------------------------------------------------------------------


def ship(*entries: Entry) -> None:
    store.SHIPPED.mkdir(exist_ok=True)
    (store.SHIPPED / "table.json").write_text(json.dumps([dataclasses.asdict(e) for e in entries]))
    store.shipped.cache_clear()
    store.find.cache_clear()


def test_the_cache_comes_before_shipped_tables_and_this_card_before_its_kind() -> None:
    card = dataclasses.replace(HERE, name="NVIDIA H100", torch="2.11.0")
    assert store.find(LIKE, HERE) is None
    ship(entry(machine=dataclasses.replace(HERE, ptxas="13.1.80")), entry(machine=dataclasses.replace(HERE, capability="sm_100")))
    assert store.find(LIKE, HERE) is None
    ship(entry(machine=card))
    assert store.find(LIKE, HERE) == entry(machine=card)
    ship(entry(machine=card), entry())
    assert store.find(LIKE, HERE) == entry()
    ours = entry(plans={"scan": {**PLAN, "BV": 128}})
    store.save(ours)
    assert store.find(LIKE, HERE) == ours


def test_a_shipped_plan_that_was_rejected_here_is_not_used() -> None:
    ship(entry())
    store.reject(LIKE, HERE, Rejected("scan", PLAN, "wrong"))
    found = store.find(LIKE, HERE)
    assert found is None or not found.plans


def test_looking_up_again_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(entry())
    assert store.find(LIKE, HERE) == entry()
    with monkeypatch.context() as m:
        m.setattr(store, "load", pytest.fail)
        m.setattr(store, "shipped", pytest.fail)
        assert store.find(LIKE, HERE) == entry()


def test_shipped_tables_are_readable() -> None:
    for path in Path(store.__file__).parent.glob("*.json"):
        for record in json.loads(path.read_text()):
            assert Entry.of(record).machine.ptxas


def on_a_gpu(made: trials.Subject) -> dict[str, Any]:
    """Launches of a subject on tensors that say that they are on a GPU."""
    call = trials.draw(made, made.shapes[0], "typical", "meta")
    with FakeTensorMode():
        inputs = {n: torch.empty(x.shape, dtype=x.dtype, device="cuda:0") for n, x in call.inputs.items()}
        return trials.launches(made, dataclasses.replace(call, inputs=inputs))


def test_a_launch_takes_adopted_plans_then_tuned_ones_then_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "machine", lambda index: HERE)
    made = subject(sizes=(64, 256, 2, 128, 128))
    programs = trials.compiled(made)
    usual = defaults(programs["backward"], made.shape(made.shapes[0]))
    run = on_a_gpu(made)["backward"]
    assert {k.kernel.name: run.plan(k) for k in run.compiled.kernels if k.how != "slow"} == usual
    fast, slow = trials.pair(run.compiled, next(k.kernel.name for k in run.compiled.kernels if k.how == "slow" and k.split))
    tuned = {**usual[fast.kernel.name], f"B{fast.split}": 32, "num_stages": 3}
    like = trials.likes(made)[made.shapes[0], "backward"]
    store.save(Entry(like, HERE, {fast.kernel.name: tuned}))
    before, run = run, on_a_gpu(made)["backward"]
    assert {k.kernel.name: run.plan(k) for k in run.compiled.kernels if k.how != "slow"} == {**usual, fast.kernel.name: tuned}
    assert run.plan(slow) == {**before.plan(slow), f"B{fast.split}": 32}, "both add to the same partial sums"
    programs["backward"].recordings[("before",)] = None  # type: ignore[assignment]
    programs["backward"].adopt({fast.kernel.name: {"num_warps": 1}})
    try:
        assert not programs["backward"].recordings, "recorded launches would repeat the old plan"
        assert on_a_gpu(made)["backward"].plan(fast) == {**usual[fast.kernel.name], "num_warps": 1}
    finally:
        programs["backward"].adopt({})


# -- real plans, interpreted ------------------------------------------------------------------------------------------


def narrow(method: str) -> dict[str, float]:
    """How much 32 columns change, for each kernel alone; gates reach the slow kernels, which share the blocks of the fast."""
    trials.DEVICE = "cpu"
    torch.set_num_threads(1)
    made = subject(method, (1, 32, 1, 64, 64), dtype="float16", gates="float16")
    plan = compile_plan(getattr(lsmc.zoo, method).canonical, Options(chunk=32, schedule="two_pass", target="triton"))
    trials.plan_of = lambda subject: trials.ops.plan_of(trials.ops.register(plan))  # type: ignore[assignment]
    call = trials.draw(made, (1, 48, 1, 64, 64), "mixture", "cpu")
    right, out = trials.operate(made, call), {}
    for direction, program in trials.compiled(made).items():
        for k in program.kernels:
            if k.split and k.how != "slow":
                trials.adopt(made, made.shapes[0], {direction: {k.kernel.name: {f"B{k.split}": 32}}})
                found = trials.operate(made, call)
                out[k.name] = max(float((found[n] - x).abs().max() / x.abs().max()) for n, x in right.items())
        trials.adopt(made, made.shapes[0], {})
    return out


def test_narrow_blocks_give_the_same_numbers() -> None:
    with workers(1) as pool:
        for kernel, off in pool.pool.submit(narrow, "gla").result().items():
            assert off < 2e-3, kernel


# -- the command ------------------------------------------------------------------------------------------------------


class Device:
    """Stands for a GPU: some plans are wrong, some crash, the others take a time that follows from their numbers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tried: list[Any] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (80 << 30, 80 << 30))
        monkeypatch.setattr(store, "machine", lambda index: HERE)
        monkeypatch.setattr(tuning, "apart", self.apart)

    @staticmethod
    def fate(plan: dict[str, int]) -> Failure | None:
        if plan["num_warps"] == 8:
            return Failure("its process died of SIGSEGV")
        return Failure("wrong, typical gates: o is off by 1.0e+00") if 32 in (plan["BK"], plan["BV"]) else None

    @staticmethod
    def time(plan: dict[str, int]) -> float:
        return 2.0 - 0.1 * plan["num_stages"] + plan["BV"] / 1000

    def apart(self, work: Callable[..., Any], jobs: Sequence[Any], *_: Any) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            if work is trials.settle:
                yield job, (2.0, 1.0)
                continue
            self.tried.append((work, job))
            plan = job.candidate.plan
            yield job, {trials.compile_trial: lambda: None, trials.check_trial: lambda plan=plan: self.fate(plan),
                        trials.time_trial: lambda plan=plan, job=job: [self.time(plan)] * len(job.subject.shapes)}[work]()


def test_tuning_stores_the_best_right_plans_and_never_tries_a_wrong_one_again(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    device, out = Device(monkeypatch), tmp_path / "table.json"
    cli.main(["tune", "gla", "--shapes", "16,4096,8,128,128", "8,4096,8,128,128", "--out", str(out)])
    said = capsys.readouterr().out
    found = [Entry.of(record) for record in json.loads(out.read_text())]
    assert len(found) == 4  # two shapes, two directions
    for e in found:
        assert store.find(e.like, HERE) == e
        assert e.rejected
        for kernel, plan in e.plans.items():
            assert Device.fate(plan) is None
            assert kernel in said
            if "scan" in kernel:
                assert plan["num_stages"] == 3
    assert "died of SIGSEGV" in said
    timed = [job for work, job in device.tried if work is trials.time_trial]
    assert timed
    assert all(Device.fate(job.candidate.plan) is None for job in timed)
    device.tried.clear()
    cli.main(["tune", "gla", "--shapes", "32,4096,8,128,128"])  # the same kernels, another class
    assert device.tried
    assert all(Device.fate(job.candidate.plan) is None for _, job in device.tried)
    capsys.readouterr()
    cli.main(["explain", "gla", "--stage", "backward_schedule"])
    said = capsys.readouterr().out
    assert "tuned on NVIDIA H200: 128 sequences of 4096" in said
    assert "us predicted" in said


def test_what_is_wrong_together_is_not_stored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    device = Device(monkeypatch)
    alone = device.apart
    monkeypatch.setattr(tuning, "apart", lambda work, jobs, *rest: (
        ((job, Failure("wrong together")) for job in jobs) if work is trials.settle else alone(work, jobs, *rest)))
    entries = tuning.run(["bla"], shapes=["16,4096,8,128,128"])
    assert all(not e.plans for e in entries)
    assert "not stored: wrong together" in capsys.readouterr().out


def test_tuning_says_that_it_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LsmConfigError, match="needs an NVIDIA GPU"):
        tuning.run(["gla"])
    with pytest.raises(LsmConfigError, match="'int8'"):
        tuning.run(["gla"], dtype="int8")


def test_candidates_are_listed_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lsmc.lowering.offline import Resources

    def compiled(work: Any, jobs: Sequence[Any], *_: Any) -> Iterator[tuple[Any, Any]]:
        for job in jobs:
            plan = job.candidate.plan
            shared = 300 << 10 if plan["num_stages"] == 3 else 1 << 10
            yield job, [Resources(job.candidate.kernel, 255, 16, shared, 1, plan["num_warps"], plan["num_stages"])]

    monkeypatch.setattr(tuning, "apart", compiled)
    cli.main(["tune", "bla", "--shapes", "16,4096,8,128", "--dry-run"])
    said = capsys.readouterr().out
    assert "predicted ms at 16,4096,8,128,128" in said
    assert "never: too much shared memory" in said
    assert "backward reverse_scan_K" in said
