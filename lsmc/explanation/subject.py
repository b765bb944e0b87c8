"""What a page is about: a method, its plan, what was weighed and what was found out, each worked out once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from lsmc import laws
from lsmc.canonical import Canonical
from lsmc.errors import LsmCheckError
from lsmc.explanation.costs import Candidate, Compiling, Token, candidates, obstacle, per_token, resources
from lsmc.explanation.marks import Trail
from lsmc.lowering.plan import Direction
from lsmc.lsm import LSM
from lsmc.schedules import Shape

if TYPE_CHECKING:
    from lsmc.explanation import Explanation

WAYS = {"f": "forward", "b": "backward"}
PALETTE = tuple(f"var(--{letter})" for letter in "acbdegfhi")


@dataclass
class Findings:
    """What was found out by compiling and testing."""

    kernels: dict[tuple[str, int], Any] = field(default_factory=dict)
    """By direction and place: `Resources`, or a `Failure`."""
    obstacle: str = ""
    """Why nothing was compiled."""
    laws: laws.Report | LsmCheckError | None = None


def find_out(explanation: Explanation, examples: int) -> Findings:
    """Compile the kernels and test the laws: what takes time. A bar shows it where standard error is a terminal."""
    found, plan = Findings(obstacle=obstacle()), explanation.plan
    ways = {"b": plan.backward, "f": plan.training}  # the longest first
    jobs = {Compiling(d.program, d.choice.schedule, flagged(d), n, plan.shape): (w, n)
            for w, d in ways.items() for n in range(len(kernels_of(d))) if not found.obstacle}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        try:
            for job, result in bar.track(resources(list(jobs)), len(jobs), description="compiling for sm_90"):
                found.kernels[jobs[job]] = result
        except RuntimeError as error:  # no process can start
            found.obstacle = str(error)
        bar.add_task("testing laws", total=None)
        try:
            found.laws = laws.check(explanation.declaration, examples=examples, progress=False)
        except LsmCheckError as error:
            found.laws = error
    return found


def kernels_of(direction: Direction) -> tuple[Any, ...]:
    """The kernels that Triton runs for a direction; none where it runs as ATen operations."""
    executable: Any = direction.executable
    return tuple(executable.kernels) if direction.target == "triton" else ()


def flagged(direction: Direction) -> bool:
    """Whether the kernels of a backward are told by its forward which chunks have mild decays."""
    return direction.before is not None and "_flags" in direction.before.executable.keeps


@dataclass(frozen=True)
class Subject:
    """A method on its page; dictionaries are by direction, "f" and "b"."""

    explanation: Explanation
    found: Findings

    @property
    def declaration(self) -> LSM:
        return self.explanation.declaration

    @property
    def canonical(self) -> Canonical:
        return self.explanation.plan.canonical

    @property
    def shape(self) -> Shape:
        return self.explanation.plan.shape

    @cached_property
    def trail(self) -> Trail:
        return Trail(self.explanation.plan)

    @cached_property
    def directions(self) -> dict[str, Direction]:
        return {"f": self.explanation.plan.training, "b": self.explanation.plan.backward}

    @cached_property
    def candidates(self) -> dict[str, list[Candidate]]:
        return {w: candidates(d, self.shape) for w, d in self.directions.items()}

    @cached_property
    def tokens(self) -> dict[str, Token]:
        return {w: per_token(self.trail.program(w), found[0], self.shape) for w, found in self.candidates.items()}

    @property
    def on_gpu(self) -> bool:
        """Whether kernels were generated for both directions, so that estimated times are theirs."""
        return all(d.target == "triton" for d in self.directions.values())

    def colours(self, way: str) -> dict[str, str]:
        """Of the kernels, those of the chosen schedule first."""
        names = dict.fromkeys(launch.name for c in self.candidates[way] for launch in c.launches)
        return {n: PALETTE[i % len(PALETTE)] for i, n in enumerate(names)}

    def bodies(self, way: str) -> dict[str, set[int]]:
        """The values that each kernel of the chosen schedule works out, in the program of the page."""
        launches = self.candidates[way][0].launches
        if self.directions[way].target != "triton":
            return {launch.name: set(launch.body) for launch in launches}
        places = self.trail.gathered(way)
        return {launch.name: {i for i, j in places.items() if j in launch.body} for launch in launches}

    def sizes(self) -> str:
        s = self.shape
        return f"{s.sequences} sequences (heads counted) of {s.tokens:,} tokens, K = {s.key}, V = {s.value}, chunks of {s.chunk}"
