"""Which term or value each line of a stage is about: so that what is pointed at in one stage is found in the others.

Names are those of inputs, memories, outputs and terms of the canonical form (``n-k``, ``n-U0``), and of the values of the
two chunk programs (``f13``, ``b20``). Passes below keep them: a program whose every value is a term is followed through.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lsmc.adjoint import differentiate
from lsmc.canonical import Canonical
from lsmc.chunk import derive
from lsmc.factors import hoist
from lsmc.ir import Program
from lsmc.lowering.backends.aten_rewrites import rewrite
from lsmc.lowering.backends.triton_emit import launches
from lsmc.lowering.backends.triton_mild import mild
from lsmc.lowering.backends.triton_steady import unweighted
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.plan import Plan, sharings
from lsmc.schedules import CUTS

VALUE = re.compile(r"\b[vfghswa](\d+)u?(?:_\d+)*\b")
"""A value of a generated program, in one of its forms."""
TILE = re.compile(r"\bt_(\d+)\b")
NAME = re.compile(r"\b(?:[poisem]|end|to)_(\w+)|tiles\['(\w+)'\]|start\['(\w+)'\]")


@dataclass(frozen=True)
class Marks:
    """What a line states, and what it uses."""

    states: frozenset[str] = frozenset()
    uses: frozenset[str] = frozenset()

    def __str__(self) -> str:
        """As attributes of an element."""
        kinds = (("data-t", self.states), ("data-u", self.uses - self.states))
        return " ".join(f"{k}='{html.escape(' '.join(sorted(names)), quote=True)}'" for k, names in kinds if names)


def name(term: str) -> str:
    return f"n-{term}"


class Trail:
    """The programs of a method, and where the values of each are in the others."""

    def __init__(self, plan: Plan) -> None:
        chunk = derive(plan.canonical, plan.scale)
        self.derived = chunk
        tracked = replace(chunk, terms=(*chunk.terms, *((f"={op.id}", op.id) for op in chunk.ops)))
        self.adjoint = differentiate(chunk)
        self.forward, self.backward = hoist(tracked), hoist(differentiate(tracked))
        origin = {t: i for t, i in self.forward.terms if t.startswith("=")}
        self.first: dict[int, set[str]] = {}
        """Of a value of the backward program: the values of the forward program that it is."""
        for t, i in self.backward.terms:
            if t in origin:
                self.first.setdefault(i, set()).add(f"f{origin[t]}")
        first, second = _numbered(self.forward), _numbered(self.backward)
        pairs = [(first, second), *sharings(plan.training.target, first, second, [cut(second) for cut in CUTS.values()])]
        chosen = next(pair for pair in pairs if pair == (plan.training.program, plan.backward.program))
        self.scheduled = dict(zip("fb", chosen))
        """The programs that were cut into kernels, their terms the numbers of the values here."""
        self.schedules = {"f": plan.training.choice.schedule, "b": plan.backward.choice.schedule}

    def program(self, way: str) -> Program:
        return self.forward if way == "f" else self.backward

    def terms(self, way: str) -> dict[int, str]:
        """What the values of a program are called in the canonical form."""
        out: dict[int, str] = {}
        for t, i in self.program(way).terms:
            if not t.startswith("="):
                out[i] = t if i not in out or out[i] == t else f"{out[i]}, {t}"
        return out

    def values(self, way: str) -> dict[int, Marks]:
        """What each operation of a program states and uses."""
        program = self.program(way)
        stated: dict[int, set[str]] = {op.id: {f"{way}{op.id}"} for op in program.ops}
        for op in program.ops:
            if op.kind == "input":
                stated[op.id].add(name(op.attr("name")))
            elif op.kind == "valid":  # the same, but for rows behind the end
                stated[op.id] |= {t for t in stated[op.args[0]] if t.startswith("n-")}
        for t, i in program.terms:
            if not t.startswith("="):
                stated[i].add(name(t))
        for i, first in self.first.items() if way == "b" else ():
            stated[i] |= first
        uses = {op.id: {t for a in op.args for t in stated[a]} for op in program.ops}
        for n, i in program.outputs:
            (stated if way == "f" else uses)[i].add(name(n.removeprefix("d_")))
        for c in program.carries:
            uses[c.out].add(name(c.name.removeprefix("d_")))
        for i in _from_alone(program, [i for t, i in program.terms if t == "decay"]):
            uses[i].add(name("decay"))
        return {i: Marks(frozenset(stated[i]), frozenset(uses[i])) for i in stated}

    def lines(self, way: str) -> list[tuple[str, Marks, str]]:
        """The text of a program line by line, with marks and the names of terms."""
        program, marks, terms = self.program(way), self.values(way), self.terms(way)
        out = [(str(op), marks[op.id], terms.get(op.id, "")) for op in program.ops]
        for c in program.carries:
            out.append((str(c), Marks(frozenset({name(c.name)}), frozenset({f"{way}{c.inp}", f"{way}{c.out}"})), ""))
        for n, i in program.outputs:
            base = {name(n)} | ({name(n.removeprefix("d_"))} if way == "b" else set())
            out.append((f"output {n} = %{i}", Marks(frozenset(base), frozenset({f"{way}{i}"})), ""))
        return out

    def gathered(self, way: str) -> dict[int, int]:
        """Where the values of a program are in the one from which Triton's kernels are cut."""
        return {int(t): i for t, i in gather(self.scheduled[way]).terms}

    def kept(self) -> list[tuple[str, Marks]]:
        """The lines of the values that the forward keeps for the backward, there."""
        taken, marks = {i for _, i in self.scheduled["b"].taken}, self.values("b")
        return [(str(self.backward.index[int(t)]), marks[int(t)]) for t, i in self.scheduled["b"].terms if i in taken]

    def source(self, way: str, text: str, target: str) -> list[tuple[str, Marks]]:
        """The lines of generated code with what they work out and use."""
        tracked = self.scheduled[way]
        if target == "aten":
            whole = self._numbers(way, rewrite(tracked))
            return [(line, _line(line, whole, whole)) for line in text.splitlines()]
        gathered = gather(tracked)
        whole, factored = self._numbers(way, gathered), self._numbers(way, mild(gathered)[0])
        forms = {f"{p.name}_{q.kernel.name}": unweighted(p, q) for p, q in launches(gathered, self.schedules[way])}
        scaled = {n: self._numbers(way, form[0]) for n, form in forms.items() if form}
        out, inside, branch, kernel = list[tuple[str, Marks]](), -1, whole, ""
        for line in text.splitlines():
            depth = len(line) - len(line.lstrip())
            if line.strip() and depth <= inside:
                inside = -1
            out.append((line, _line(line, whole if inside < 0 else branch, whole)))
            kernel = found[1] if (found := re.match(r"def (\w+)", line)) else kernel
            if line.strip() in ("if HOW == 0:", "if fine:"):  # a branch for mild decays has a program, and numbers, of its own
                inside, branch = depth, factored if "HOW" in line else scaled[kernel]
        return out

    def _numbers(self, way: str, program: Program) -> dict[int, set[str]]:
        """Of each value of a program whose terms are numbers of this one: the names of what it is."""
        marks, out = self.values(way), dict[int, set[str]]()
        for t, i in program.terms:
            out.setdefault(i, set()).update(marks[int(t)].states)
        return out


def _numbered(program: Program) -> Program:
    """A program whose terms are the numbers of its values."""
    return replace(program, terms=tuple((str(op.id), op.id) for op in program.ops))


def _from_alone(program: Program, roots: Iterable[int]) -> set[int]:
    """The values that depend on nothing but these."""
    out = set(roots)
    for op in program.ops:
        if op.args and set(op.args) <= out:
            out.add(op.id)
    return out


def _line(line: str, values: Mapping[int, set[str]], tiles: Mapping[int, set[str]]) -> Marks:
    target, equals, right = line.partition(" = ")
    if not equals or target.strip().startswith(("if ", "def ", "tl.")) or "(" in target:
        target, right = "", line
    stated = {m for i in VALUE.findall(target) for m in values.get(int(i), ())}
    used = {m for i in VALUE.findall(right) for m in values.get(int(i), ())}
    used |= {m for i in TILE.findall(line) for m in tiles.get(int(i), ())}
    used |= {name(n) for found in NAME.findall(line) for n in found if n}
    return Marks(frozenset(stated), frozenset(used))


def canonical_lines(c: Canonical) -> list[tuple[str, Marks]]:
    """The text of a canonical form with what each line states and uses."""
    head, *rest = str(c).splitlines()
    known = {f.name for f in (*c.inputs, *c.states, *(r.symbol for r in c.reads), *(y.symbol for y in c.queries))} | {"o"}
    out = [(head, Marks(uses=frozenset(map(name, (f.name for f in c.inputs)))))]
    writes = 0
    for line in rest:
        word = line[:10].strip()
        stated: set[str] = set()
        if word in ("decay", "add"):
            stated = {word if word == "decay" else "M"}
        elif word in ("read", "query", "output"):
            stated = {line[10:].partition(" = ")[0].strip()}
        else:
            stated, writes = {f"U{writes}", *(["momentum"] if c.momentum is not None and not writes else [])}, writes + 1
        used = {t for t in re.findall(r"[A-Za-z_]\w*", line[10:]) if t in known}
        out.append((line, Marks(frozenset(map(name, stated)), frozenset(map(name, used)))))
    return out


def declared_lines(lines: Iterable[str], c: Canonical) -> list[tuple[str, Marks]]:
    """The user's own text with the names that occur in it."""
    known = {f.name for f in (*c.inputs, *c.states)}
    written = {r.symbol.name for r in c.reads} | {f"U{n}" for n in range(len(c.writes))}
    found = {"decay=": {"decay"}, "momentum=": {"momentum"}, "update=": written, "recurrence=": written,
             "readout=": {y.symbol.name for y in c.queries} | {"o"}}
    out = []
    for line in lines:
        used = {t for t in re.findall(r"[A-Za-z_]\w*", line) if t in known}
        used |= {t for word, terms in found.items() if word in line for t in terms}
        out.append((line, Marks(uses=frozenset(map(name, used)))))
    return out




__all__ = ["Marks", "Trail", "canonical_lines", "declared_lines", "name"]
