"""The order in which a kernel computes its values: few of them alive at once, because registers are what runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lsmc.ir import Op

Weight = Callable[[Op], int]

THOROUGH, QUICK = 64, 8
"""Sets of finished values that a search goes on with: for code, and for what depends on its room."""


def order(body: Sequence[Op], roots: Sequence[int], weight: Weight, states: int = THOROUGH) -> list[Op]:
    """`body` in the order, of two candidates, that keeps the least weight of values alive at its worst moment.

    roots: values that leave the kernel; they are stored as soon as they exist. states: those that the search for the second
    candidate keeps of each step; with 0 there is the first only, which is found at once.
    """
    found = _depth_first(body, roots, weight)
    return min(_searched(body, weight, states), found, key=lambda ops: peak(ops, weight)) if states else found


def peak(ops: Sequence[Op], weight: Weight) -> int:
    """The largest weight of values alive at once when `ops` run in this order."""
    uses = _uses(ops)
    known = {op.id: op for op in ops}
    alive, worst = 0, 0
    for op in ops:
        alive += weight(op)
        worst = max(worst, alive)
        for a in set(op.args) & known.keys():
            uses[a] -= 1
        alive -= sum(weight(known[a]) for a in {*op.args, op.id} & known.keys() if not uses[a])
    return worst


def _uses(ops: Sequence[Op]) -> dict[int, int]:
    uses: dict[int, int] = {op.id: 0 for op in ops}
    for op in ops:
        for a in set(op.args):
            uses[a] = uses.get(a, 0) + 1
    return uses


def _depth_first(body: Sequence[Op], roots: Sequence[int], weight: Weight) -> list[Op]:
    """Each root's operands before it, those that need the most room first."""
    known = {op.id: op for op in body}
    room: dict[int, int] = {}
    for op in body:
        needs = sorted((room.get(a, 0) for a in set(op.args)), reverse=True)
        room[op.id] = max([weight(op), *(n + i * weight(op) // 4 for i, n in enumerate(needs))])
    out: list[Op] = []
    done: set[int] = set()

    def visit(i: int) -> None:
        if i in done or i not in known:
            return
        done.add(i)
        for a in sorted(set(known[i].args), key=lambda a: -room.get(a, 0)):
            visit(a)
        out.append(known[i])

    for r in [*roots, *(op.id for op in body)]:
        visit(r)
    return out


class _State(NamedTuple):
    """A set of finished values, as bits, and the best way found to it: the state before, and what came then. `tight`: the most
    alive where what is elementwise takes the place of an operand that nothing needs any more."""

    peak: int
    alive: int
    tight: int
    done: int
    before: _State | None = None
    last: int = 0


def _searched(body: Sequence[Op], weight: Weight, keep: int) -> list[Op]:
    """A beam search over sets of finished values: the least peak first, then the least alive."""
    number = {op.id: n for n, op in enumerate(body)}
    weights = [weight(op) for op in body]
    args = [[number[a] for a in dict.fromkeys(op.args) if a in number] for op in body]
    needs = [sum(1 << a for a in mine) for mine in args]
    users = [sum(1 << n for n, need in enumerate(needs) if need >> a & 1) for a in range(len(body))]
    states = [_State(0, 0, 0, 0)]
    for _ in body:
        found: dict[int, _State] = {}
        for s in states:
            for n, need in enumerate(needs):
                if s.done >> n & 1 or need & ~s.done:
                    continue
                done, most = s.done | 1 << n, s.alive + weights[n]
                gone = [weights[a] for a in args[n] if not users[a] & ~done]
                place = min(weights[n], max(gone, default=0)) if body[n].kind == "map" else 0
                left = most - sum(gone) - weights[n] * (not users[n] & ~done)
                state = _State(max(s.peak, most), left, max(s.tight, most - place), done, s, n)
                if done not in found or state[:3] < found[done][:3]:
                    found[done] = state
        states = sorted(found.values(), key=lambda s: s[:3])[:keep]
    path, state = list[Op](), states[0]
    while state.before:
        path.append(body[state.last])
        state = state.before
    return path[::-1]
