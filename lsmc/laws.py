"""``lsmc.check``: laws that every declaration obeys, tested on random sizes, gates and splits.

The compiled operator of a declaration is compared, in float64, with its step-by-step recurrence (`lsmc.reference`) and
with itself. hypothesis draws the cases (`lsmc.cases`) and shrinks a failure to the smallest one that still fails.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from lsmc.cases import CORNERS, Case, State, _randn, cases, sample, tensors
from lsmc.errors import LsmCheckError
from lsmc.reference import reference

TOLERANCE = 1e-10
"""Largest RMS error over the RMS of the reference, float64."""

TOO_LARGE = 1e8
"""Cases whose reference leaves this range say nothing about rounding and are skipped, and counted."""

# --- running a declaration


def _join(states: Sequence[State]) -> State:
    first = states[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat([tensors(state)[0] for state in states])
    return tuple(torch.cat(parts) for parts in zip(*(tensors(state) for state in states)))


Outputs = list[Tensor]
"""The output, then the tensors of the final state."""


def _run(op: Callable[..., Any], inputs: Mapping[str, Tensor], state: State, **options: Any) -> Outputs:
    o, final = op(**inputs, initial_state=state, return_final_state=True, **options)
    return [o, *tensors(final)]


def _cotangents(outputs: Outputs, seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed + 1)
    return [_randn(tuple(x.shape), generator).to(x.device) for x in outputs]


def _gradients(outputs: Outputs, leaves: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Gradients of a random projection of all outputs; zeros where nothing flows."""
    pairs = [(x, c) for x, c in zip(outputs, _cotangents(outputs, seed)) if x.requires_grad]
    if not pairs or not leaves:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad([x for x, _ in pairs], leaves, [c for _, c in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


# --- comparing


class _Skip(Exception):
    """This case says nothing: the memory grows beyond all bounds."""


@dataclass
class _Tally:
    """The worst error that a law saw, and how many cases counted."""

    worst: float = 0.0
    cases: int = 0
    skipped: int = 0

    def close(self, what: str, found: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
        """RMS of the difference over RMS of what is wanted; raises `LsmCheckError` beyond the tolerance."""
        if found.shape != wanted.shape:
            raise LsmCheckError(f"{what}: shape {tuple(found.shape)}, expected {tuple(wanted.shape)}")
        if found.numel() == 0:
            return
        found, wanted = found.detach(), wanted.detach()
        if not bool(torch.isfinite(found).all()):
            raise LsmCheckError(
                f"{what} has {int((~torch.isfinite(found)).sum())} elements that are not finite"
            )
        error = float((found - wanted).square().mean().sqrt() / wanted.square().mean().sqrt().clamp(min=1e-3))
        self.worst = max(self.worst, error)
        if error > tolerance:
            raise LsmCheckError(f"{what}: relative RMS error {error:.1e}, tolerance {tolerance:.0e}")


def _in_range(outputs: Outputs) -> None:
    for x in outputs:
        if x.numel() and not (bool(torch.isfinite(x).all()) and float(x.detach().abs().max()) < TOO_LARGE):
            raise _Skip


# --- the laws


def chunk_form_equals_recurrence(op: Any, case: Case, tally: _Tally) -> None:
    """Output, final state and every gradient of the chunk-parallel form are those of the step-by-step recurrence."""
    drawn = sample(op, case)
    wanted = _run(reference(op), drawn.inputs, drawn.state, scale=case.scale)
    _in_range(wanted)
    found = _run(op, drawn.inputs, drawn.state, scale=case.scale, chunk=case.chunk)
    for index, (x, y) in enumerate(zip(found, wanted, strict=True)):
        tally.close("the output" if index == 0 else "the final state", x, y)
    names = [*drawn.inputs, *(["the initial state"] * 2)]
    leaves = drawn.leaves()
    wanted_gradients = _gradients(wanted, leaves, case.seed)
    _in_range(wanted_gradients)
    for name, x, y in zip(names, _gradients(found, leaves, case.seed), wanted_gradients):
        tally.close(f"the gradient of {name}", x, y)


def split_equals_whole(op: Any, case: Case, tally: _Tally) -> None:
    """A sequence run in pieces, each from the state that the last one left, gives what the whole sequence gives."""
    drawn = sample(op, case)
    whole = _run(op, drawn.inputs, drawn.state, scale=case.scale, chunk=case.chunk)
    _in_range(whole)
    state, parts = drawn.state, []
    for start, stop in case.pieces:
        o, state = op(
            **drawn.between(start, stop),
            initial_state=state,
            return_final_state=True,
            scale=case.scale,
            chunk=case.chunk,
        )
        parts.append(o)
    pieced = [torch.cat(parts, dim=1), *tensors(state)]
    for index, (x, y) in enumerate(zip(pieced, whole, strict=True)):
        tally.close("the output" if index == 0 else "the final state", x, y)
    leaves = drawn.leaves()
    names = [*drawn.inputs, *(["the initial state"] * 2)]
    wanted = _gradients(whole, leaves, case.seed)
    _in_range(wanted)
    for name, x, y in zip(names, _gradients(pieced, leaves, case.seed), wanted):
        tally.close(f"the gradient of {name}", x, y)


def decoding_equals_parallel(op: Any, case: Case, tally: _Tally) -> None:
    """Token by token with `step` gives what the parallel form gives."""
    drawn = sample(op, case)
    with torch.no_grad():
        whole = _run(op, drawn.inputs, drawn.state, scale=case.scale, chunk=case.chunk)
        _in_range(whole)
        state, parts = drawn.state, []
        for token in range(case.time):
            now = {name: x[:, token] if name in drawn.per_token else x for name, x in drawn.inputs.items()}
            o, state = op.step(**now, state=state, scale=case.scale)
            parts.append(o)
        if not parts:
            return
        for index, (x, y) in enumerate(zip([torch.stack(parts, dim=1), *tensors(state)], whole, strict=True)):
            tally.close("the output" if index == 0 else "the final state", x, y)


def outputs_do_not_see_later_tokens(op: Any, case: Case, tally: _Tally) -> None:
    """Other later tokens leave earlier outputs as they were, to the last bit; no gradient flows back in time."""
    cut = case.pieces[0][1]
    drawn, other = sample(op, case), sample(op, dataclasses.replace(case, seed=case.seed + 1))
    options = {"scale": case.scale, "chunk": case.chunk, "return_final_state": True}
    mixed = {
        name: torch.cat([x[:, :cut], other.inputs[name][:, cut:]], 1) if name in drawn.per_token else x
        for name, x in drawn.inputs.items()
    }
    o, _ = op(**drawn.inputs, initial_state=drawn.state, **options)
    changed, _ = op(**mixed, initial_state=drawn.state, **options)
    _in_range([o])
    if not torch.equal(o[:, :cut], changed[:, :cut]):
        difference = float((o[:, :cut] - changed[:, :cut]).detach().abs().max())
        raise LsmCheckError(f"tokens from {cut} on change outputs before {cut}, by up to {difference:.1e}")
    if not o.requires_grad:
        return
    leaves = [drawn.inputs[name] for name in drawn.inputs if name in drawn.per_token]
    names = [name for name in drawn.inputs if name in drawn.per_token]
    for name, gradient in zip(names, _gradients([o[:, :cut]], leaves, case.seed)):
        if bool((gradient[:, cut:] != 0).any()):
            raise LsmCheckError(f"outputs before {cut} have gradients in {name} from token {cut} on")


def packed_equals_separate(op: Any, case: Case, tally: _Tally) -> None:
    """Sequences packed one behind the other (`cu_seqlens`, empty ones among them) do not touch each other."""
    case = dataclasses.replace(case, batch=1)
    drawn = sample(op, case, batch=len(case.pieces))
    ends = torch.tensor([0, *(stop for _, stop in case.pieces)], dtype=torch.int32)
    packed = _run(op, drawn.inputs, drawn.state, scale=case.scale, chunk=case.chunk, cu_seqlens=ends)
    states = [_part(drawn.state, index) for index in range(len(case.pieces))]
    runs = [
        op(
            **drawn.between(start, stop),
            initial_state=state,
            return_final_state=True,
            scale=case.scale,
            chunk=case.chunk,
        )
        for (start, stop), state in zip(case.pieces, states)
    ]
    alone = [torch.cat([o for o, _ in runs], dim=1), *tensors(_join([final for _, final in runs]))]
    _in_range(alone)
    for index, (x, y) in enumerate(zip(packed, alone, strict=True)):
        tally.close("the output" if index == 0 else "the final state", x, y)
    leaves = drawn.leaves()
    names = [*drawn.inputs, *(["the initial state"] * 2)]
    wanted = _gradients(alone, leaves, case.seed)
    _in_range(wanted)
    for name, x, y in zip(names, _gradients(packed, leaves, case.seed), wanted):
        tally.close(f"the gradient of {name}", x, y)


def _part(state: State, index: int) -> State:
    if state is None:
        return None
    if isinstance(state, Tensor):
        return state[index : index + 1]
    return tuple(part[index : index + 1] for part in state)


def adjoint_satisfies_the_dot_product_identity(op: Any, case: Case, tally: _Tally) -> None:
    """⟨J x, w⟩ = ⟨x, Jᵀ w⟩: the derived backward pass against the recurrence differentiated forward."""
    drawn = sample(op, case)
    names, leaves = list(drawn.inputs), drawn.leaves()

    def recurrence(*values: Tensor) -> tuple[Tensor, ...]:
        state = values[len(names) :]
        return tuple(
            _run(
                reference(op),
                dict(zip(names, values)),
                None if drawn.state is None else state[0] if isinstance(drawn.state, Tensor) else state,
                scale=case.scale,
            )
        )

    generator = torch.Generator().manual_seed(case.seed + 2)
    directions = tuple(_randn(tuple(leaf.shape), generator) for leaf in leaves)
    values, tangents = torch.func.jvp(recurrence, tuple(leaf.detach() for leaf in leaves), directions)[:2]
    _in_range([*values, *tangents])
    outputs = _run(op, drawn.inputs, drawn.state, scale=case.scale, chunk=case.chunk)
    left = [(t * c).flatten() for t, c in zip(tangents, _cotangents(outputs, case.seed))]
    right = [(d * g).flatten() for d, g in zip(directions, _gradients(outputs, leaves, case.seed))]
    size = torch.cat([*left, *right, torch.ones(1, dtype=torch.float64)]).abs().sum()
    tally.close(
        "⟨J x, w⟩ − ⟨x, Jᵀ w⟩", (torch.cat(left).sum() - torch.cat(right).sum()) / size + 1, torch.ones(())
    )


def gradients_equal_finite_differences(op: Any, case: Case, tally: _Tally) -> None:
    """`torch.autograd.gradcheck`: independent of the reference, on small sizes."""
    case = dataclasses.replace(
        case,
        batch=1,
        time=min(case.time, 3),
        heads=1,
        groups=min(case.groups, 2),
        key_dim=min(case.key_dim, 2),
        value_dim=min(case.value_dim, 2),
        gates=case.gates if case.gates in ("typical", "strong", "none") else "typical",
    )
    drawn = sample(op, case)
    names, leaves = list(drawn.inputs), drawn.leaves()
    if case.time == 0:
        return

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        state = values[len(names) :]
        start = None if drawn.state is None else state[0] if isinstance(drawn.state, Tensor) else tuple(state)
        return tuple(_run(op, dict(zip(names, values)), start, scale=case.scale, chunk=case.chunk))

    with torch.no_grad():
        _in_range(list(function(*leaves)))
    try:
        torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-5, rtol=1e-4, check_undefined_grad=False)
    except GradcheckError as error:
        raise LsmCheckError(f"gradcheck: {str(error).strip().splitlines()[0]}") from None


Law = Callable[[Any, Case, _Tally], None]

LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        chunk_form_equals_recurrence,
        split_equals_whole,
        decoding_equals_parallel,
        outputs_do_not_see_later_tokens,
        packed_equals_separate,
        adjoint_satisfies_the_dot_product_identity,
        gradients_equal_finite_differences,
    )
}
"""Every law by its name, in the order in which they are tested."""


# --- check


@dataclass
class Report:
    """What `check` tested: for each law the number of cases and the worst error, relative, float64."""

    name: str
    laws: dict[str, _Tally] = field(default_factory=dict)
    seconds: float = 0.0

    def __str__(self) -> str:
        width = max(map(len, self.laws), default=0)
        lines = [f"{self.name}: {len(self.laws)} laws hold ({self.seconds:.1f} s)"]
        for law, tally in self.laws.items():
            skipped = (
                f", {tally.skipped} skipped: the memory grows beyond {TOO_LARGE:.0e}" if tally.skipped else ""
            )
            lines.append(
                f"  {law.replace('_', ' '):{width}}  {tally.cases:4} cases, worst {tally.worst:.1e}{skipped}"
            )
        return "\n".join(lines)


def check(
    declaration: Any,
    *,
    examples: int = 20,
    seed: int = 0,
    laws: Sequence[str] | None = None,
    progress: bool | None = None,
) -> Report:
    """Test that a declaration's compiled forms obey the laws above, in float64 on the CPU.

    examples  random cases for each law (sizes, gates, splits, chunk lengths, seeds), besides `CORNERS`
    seed      another seed draws other cases; the same one draws the same
    laws      names from `LAWS`; default: all
    progress  show a bar, or a line for each law where standard error is no terminal; default: only where it is one

    Raises `LsmCheckError` with the smallest failing case, and whatever the declaration itself raises (such as
    `LsmNotAffineError` where there is no chunk form to test).
    """
    hypothesis = _hypothesis()
    report, started = Report(declaration.name), time.perf_counter()
    wanted = list(LAWS) if laws is None else list(laws)
    tiny = sample(declaration, Case(time=1, chunk=16))
    declaration(**tiny.inputs, chunk=16)  # what cannot be compiled says so here, in a moment
    with _bar(wanted, examples, progress) as advance:
        for name in wanted:
            tally = report.laws[name] = _Tally()
            _search(hypothesis, declaration, LAWS[name], tally, examples, seed, partial(advance, name))
    report.seconds = time.perf_counter() - started
    return report


def _hypothesis() -> Any:
    try:
        import hypothesis
        import hypothesis.strategies
    except ImportError:
        raise LsmCheckError(
            "lsmc.check needs the package hypothesis", help="pip install 'lsmc[check]'"
        ) from None
    return hypothesis


def _search(
    hypothesis: Any,
    declaration: Any,
    law: Law,
    tally: _Tally,
    examples: int,
    seed: int,
    advance: Callable[[bool], None],
) -> None:
    """Runs one law on many cases; hypothesis shrinks the first failure and raises the smallest."""
    last: list[Case] = []
    failed: list[Case] = []

    def body(case: Case) -> None:
        last[:] = [case]
        advance(bool(failed))
        try:
            law(declaration, case, tally)
            tally.cases += 1
        except _Skip:
            tally.skipped += 1
        except Exception as error:
            failed.append(case)
            if isinstance(error, LsmCheckError):
                raise
            raise LsmCheckError(f"{type(error).__name__}: {error}") from error

    settings = hypothesis.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        verbosity=hypothesis.Verbosity.quiet,
    )
    try:
        hypothesis.seed(seed)(settings(hypothesis.given(case=cases(seed))(body)))()
        for corner in CORNERS:
            _shrunk(body, dataclasses.replace(corner, seed=seed))
    except LsmCheckError as error:
        raise LsmCheckError(
            f"{declaration.name} breaks a law, {law.__name__.replace('_', ' ')}: {error.rule}\n"
            f"  the smallest failing case: {last[0]}",
            where=getattr(declaration, "where", None),
            help=f"lsmc.cases.sample({declaration.name}, case).inputs are its tensors",
        ) from error.__cause__


def _shrunk(body: Callable[[Case], None], case: Case) -> None:
    """Runs one case; a failure is reported for the smallest case that is reached from it by shrinking one field at a time."""
    try:
        body(case)
    except LsmCheckError:
        smallest = Case(seed=case.seed)
        for item in fields(Case):
            now, least = getattr(case, item.name), getattr(smallest, item.name)
            tries = range(least, now) if isinstance(now, int) and item.name != "chunk" else [least]
            for value in [value for value in tries if value != now]:
                changed: dict[str, Any] = {item.name: value}
                smaller = dataclasses.replace(case, **changed)
                try:
                    body(smaller)
                except LsmCheckError:
                    case = smaller
                    break
        body(case)
        raise


@contextmanager
def _bar(laws: Sequence[str], examples: int, shown: bool | None) -> Iterator[Callable[[str, bool], None]]:
    """Yields a function to be called with a law's name for each case, and whether a failure is being shrunk."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    live = console.is_terminal and shown is not False
    with Progress(*columns, console=console, transient=True, disable=not live) as bar:
        tasks: dict[tuple[str, bool], Any] = {}

        def advance(law: str, shrinking: bool) -> None:
            name = f"{law.replace('_', ' ')}{': a smaller failing case' * shrinking}"
            if (law, shrinking) not in tasks:
                tasks[law, shrinking] = bar.add_task(name, total=None if shrinking else examples + len(CORNERS))
                if shown and not live:
                    console.print(f"{name} …", highlight=False)
            bar.advance(tasks[law, shrinking])

        yield advance
