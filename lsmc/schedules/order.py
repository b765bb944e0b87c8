"""The order in which a kernel computes its values: few of them alive at once, because registers are what runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lsmc.ir import Op

Weight = Callable[[Op], int]


def order(body: Sequence[Op], roots: Sequence[int], weight: Weight) -> list[Op]:
    """`body` in the order, of a few candidates, that keeps the least weight of values alive at its worst moment.

    roots: values that leave the kernel; they are stored as soon as they exist.
    """
    candidates = [_depth_first(body, r, weight) for r in ([], list(roots), list(reversed(roots)))]
    candidates.append(_greedy(body, roots, weight))
    return min(candidates, key=lambda ops: peak(ops, weight))


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


def _greedy(body: Sequence[Op], roots: Sequence[int], weight: Weight) -> list[Op]:
    """Always the operation that adds the least to what is alive; inputs right before their first use."""
    known = {op.id: op for op in body}
    uses = _uses(body)
    waiting = {op.id: op for op in body}
    done: set[int] = set()
    out: list[Op] = []

    def missing(op: Op) -> list[Op]:
        return [known[a] for a in dict.fromkeys(op.args) if a in known and a not in done]

    while waiting:
        ready = [(op, missing(op)) for op in waiting.values() if op.kind != "input" or len(waiting) == 1]
        ready = [(op, need) for op, need in ready if all(n.kind == "input" for n in need)]
        if not ready:
            ready = [(op, []) for op in waiting.values()]

        def growth(item: tuple[Op, list[Op]]) -> tuple[int, int]:
            op, need = item
            freed = sum(weight(known[a]) for a in set(op.args) if a in known and uses[a] == 1)
            return weight(op) + sum(map(weight, need)) - freed - (weight(op) if op.id in roots else 0), op.id

        op, need = min(ready, key=growth)
        for n in [*need, op]:
            out.append(n)
            done.add(n.id)
            del waiting[n.id]
        for a in set(op.args):
            if a in uses:
                uses[a] -= 1
    return out
