"""Tile operations of the IR on ATen: every tile is a batch `(N, B, HV, rows, columns)` over chunks, sequences and heads.

The decay form is one matrix product where decays allow it: with G the sums of g from the chunk's start, e^{G_i − G_j} =
e^{G_i} e^{−G_j} for every element (j, d) whose −G_j stays within `reach`. The form is linear in Y, so the elements beyond
it are added by halving: in a block of s tokens, a pair with i in the upper and j in the lower half factors through the
boundary between them, e^{sum over (j, i]} = e^{sum over (boundary, i]} e^{sum over (j, boundary]}. Each level is a matrix
product of operands scaled by factors ≤ 1, and sums stay short. Which way an element goes depends on tokens up to j only.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def cumsum(x: Tensor, reverse: bool = False) -> Tensor:
    """Running sum over the rows, of sums alone: −inf (an exact reset) is legal."""
    if x.shape[-1] > 1 and x.shape[-2] >= 16:
        return _running(x, reverse)
    return x.flip(-2).cumsum(-2).flip(-2) if reverse else x.cumsum(-2)


def shift(x: Tensor, reverse: bool = False) -> Tensor:
    """Every row moved to the next one (in reverse: the one before), 0 where none comes: exclusive from inclusive sums."""
    zero = torch.zeros_like(x[..., :1, :])
    return torch.cat([x[..., 1:, :], zero] if reverse else [zero, x[..., :-1, :]], -2)


@torch.library.custom_op("lsmc::running", mutates_args=())
def _running(x: Tensor, reverse: bool) -> Tensor:
    """Running sums of 8 rows in every block of 8 at once, then of the blocks: each addition is over many numbers."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    step = -1 if reverse else 1
    inputs, rows = (t.unflatten(-2, (-1, 8)).unbind(-2)[::step] for t in (x, out))
    rows[0].copy_(inputs[0])
    for before, new, row in zip(rows[:-1], inputs[1:], rows[1:], strict=True):
        torch.add(before, new, out=row)
    blocks = out.unflatten(-2, (-1, 8)).unbind(-3)[::step]
    for before, block in zip(blocks[:-1], blocks[1:], strict=True):
        block.add_(before[..., :1, :] if reverse else before[..., -1:, :])
    return out


@_running.register_fake
def _(x: Tensor, reverse: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def below(x: Tensor, strict: bool) -> Tensor:
    """Whether j < i (j <= i unless strict), (C, C). Not `tril`: torch 2.13 does not see that two traced ones are the same."""
    rows = torch.arange(x.shape[-2], device=x.device)
    return rows[:, None] > rows[None, :] if strict else rows[:, None] >= rows[None, :]


def mask(x: Tensor, strict: bool) -> Tensor:
    return torch.where(below(x, strict), x, 0.0)


def between(g: Tensor, strict: bool, before: bool) -> Tensor:
    """D_ij = exp(sum of g over (j, i]) for j < i (j <= i unless strict); g: (…, C, 1), result (…, C, C)."""
    sums = cumsum(torch.where(below(g, strict=True), g, 0.0))
    sums = shift(sums) if before else sums
    return torch.where(below(g, strict), sums, -torch.inf).exp()


def crossing(w: Tensor, before: bool) -> Tensor:
    """Of W_ij what starts to cross token l less what ends: its sum from l on is dg_l = sum of W_ij over j < l <= i (l < i
    when `before`); (…, C, C) to (…, C, 1)."""
    pairs = mask(w, strict=True)
    starts = pairs.sum(-1, keepdim=True)
    return (shift(starts, reverse=True) if before else starts) - pairs.sum(-2, keepdim=True).mT


def inverse(lower: Tensor) -> Tensor:
    """(I + L)⁻¹ for strictly lower L by blocks: [[A, 0], [L, B]]⁻¹ = [[A⁻¹, 0], [−B⁻¹ L A⁻¹, B⁻¹]]."""
    c, s = lower.shape[-1], 2
    inv = torch.ones_like(lower[..., :1, :1])[..., None].expand(*lower.shape[:-2], c, 1, 1)
    while s <= c:
        pair = inv.unflatten(-3, (c // s, 2))
        a, b = pair.select(-3, 0), pair.select(-3, 1)
        inv = _assemble(pair, -(b @ _corner(lower, s) @ a))
        s *= 2
    return inv.squeeze(-3)


class Levels:
    """The decays across the boundary of every block of s = 2, 4, … tokens, of g: (…, C, D); see the module's text.

    `up` takes the boundary to each upper row (to the row before it with `before`), `down` each lower row to the
    boundary. Those of a block of 2h come from those of its halves by one product each, so that e^g is the only
    exponential.
    """

    def __init__(self, g: Tensor, before: bool) -> None:
        self.g, self.before = g, before
        self.blocks: list[tuple[int, Tensor, Tensor]] = []
        c, h = g.shape[-2], 1
        total = g.exp().unsqueeze(-2)
        prefix, suffix = (torch.ones_like(total) if before else total), torch.ones_like(total)
        while 2 * h <= c:
            first, second = _halves(prefix, h, c)
            left, right = _halves(suffix, h, c)
            self.blocks.append((2 * h, second, left))
            h *= 2
            if 2 * h <= c:
                t_first, t_second = _halves(total, h // 2, c)
                prefix = torch.cat([first, second * t_first], -2)
                suffix = torch.cat([left * t_second, right], -2)
                total = t_first * t_second

    def gate(self, up: list[Tensor], down: list[Tensor]) -> Tensor:
        """The adjoint of these products: dg from the cotangents of log up and log down of every level."""
        c, d = self.g.shape[-2:]
        lead = torch.broadcast_shapes(self.g.shape[:-2], *(x.shape[:-3] for x in up[:1]))
        d_prefix = d_suffix = self.g.new_zeros((*lead, 1, c, d))
        d_total = self.g.new_zeros((*lead, 1, 1, d))
        for (s, _, _), d_up, d_down in reversed(list(zip(self.blocks, up, down, strict=True))):
            h = s // 2
            first, second = d_prefix[..., :h, :], d_prefix[..., h:, :]
            left, right = d_suffix[..., :h, :], d_suffix[..., h:, :]
            d_total = torch.stack([d_total + second.sum(-2, keepdim=True), d_total + left.sum(-2, keepdim=True)], -3)
            d_total = d_total.flatten(-4, -3)
            d_prefix = torch.stack([first, second + d_up], -3).flatten(-4, -3)
            d_suffix = torch.stack([left + d_down, right], -3).flatten(-4, -3)
        out = d_total if self.before else d_total + d_prefix
        return out.reshape(*lead, c, d)


def reach(dtype: torch.dtype) -> float:
    """How far G may fall for e^{−G} to be a factor: its product with any tile stays finite, and e^G keeps its digits."""
    return 400.0 if dtype == torch.float64 else 40.0


def down(up: Tensor) -> Tensor:
    """e^{−G} of e^G where that is within reach, else 0."""
    return torch.where(up >= math.exp(-reach(up.dtype)), up.reciprocal(), 0.0)


def far(up: Tensor) -> Tensor:
    """Whether any element of e^G is out of reach."""
    return up.amin() < math.exp(-reach(up.dtype))


def add(*tiles: Tensor) -> Tensor:
    """Their sum, in place where sizes allow: one pass per tile and one result."""
    out = tiles[0] + tiles[1]
    for x in tiles[2:]:
        out = out.add_(x) if torch.broadcast_shapes(out.shape, x.shape) == out.shape else out + x
    return out


def _beyond(y: Tensor, down: Tensor) -> Tensor:
    """What `down` leaves out."""
    return torch.where(down != 0, 0.0, y)


@torch.library.custom_op("lsmc::form", mutates_args=())
def form(wrt: str, x: Tensor, y: Tensor, xs: Tensor, ys: Tensor, g: Tensor, up: Tensor, down: Tensor, far: Tensor,
         strict: bool, before: bool) -> Tensor:
    """∂F/∂wrt for a decay that varies along the columns; (x, y) are the other two of P, X, Y in this order.

    up: e^G (of the token before, with `before`); down and far: of G; xs, ys: x, y with the decays they are multiplied by.
    """
    if wrt == "P":
        out = (xs @ ys.mT).tril_(-1 if strict else 0)
        return out.add_(_form_by_halving("P", x, _beyond(y, down), Levels(g, before), strict)) if far else out
    p = xs.tril(-1 if strict else 0)
    if wrt == "X":
        out = (p @ ys).mul_(up)
        return out.add_(_form_by_halving("X", x, _beyond(y, down), Levels(g, before), strict)) if far else out
    out = (p.mT @ ys).mul_(down)
    return out.add_(_beyond(_form_by_halving("Y", x, y, Levels(g, before), strict), down)) if far else out


@form.register_fake
def _(wrt: str, x: Tensor, y: Tensor, xs: Tensor, ys: Tensor, g: Tensor, up: Tensor, down: Tensor, far: Tensor,
      strict: bool, before: bool) -> Tensor:
    lead = torch.broadcast_shapes(xs.shape[:-2], ys.shape[:-2], up.shape[:-2])
    return x.new_empty((*lead, *((g.shape[-2],) * 2 if wrt == "P" else y.shape[-2:])))


def form_grads(p: Tensor, x: Tensor, y: Tensor, xs: Tensor, ys: Tensor, g: Tensor, up: Tensor, down: Tensor, far: Tensor,
               strict: bool, before: bool) -> tuple[Tensor, Tensor, Tensor]:
    """∂F/∂X, ∂F/∂Y and ∂F/∂G together, which share their products; the diagonal, which has no decay, stays out.

    ∂F/∂g is the sum of ∂F/∂G over this row and all later ones.
    """
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in (p, x, y, up)))  # some are shared by all sequences or chunks
    x, y, xs, ys = (t.expand(*lead, -1, -1) for t in (x, y, xs, ys))
    inner = mask(p, strict=True)
    to_x, to_y = inner @ ys, inner.mT @ xs
    slope = xs * to_x
    slope = (shift(slope, reverse=True) if before else slope) - ys * to_y
    dx, dy = to_x * up, to_y * down
    if not strict:
        diagonal = p.diagonal(dim1=-2, dim2=-1)[..., None]
        dx, dy = dx + diagonal * y, dy + diagonal * x
    _add_far_grads(dx, dy, slope, inner, x, y, g, down, far, before)
    return dx, dy, slope


@torch.library.custom_op("lsmc::add_far_grads", mutates_args=("dx", "dy", "slope"))
def _add_far_grads(dx: Tensor, dy: Tensor, slope: Tensor, inner: Tensor, x: Tensor, y: Tensor, g: Tensor, down: Tensor,
                   far: Tensor, before: bool) -> None:
    """Adds what `form_grads` leaves out: elements that are out of reach."""
    if far:
        rest = _form_grads_by_halving(inner, x, _beyond(y, down), Levels(g, before))
        dx.add_(rest[0])
        dy.add_(_beyond(rest[1], down))
        slope.add_(rest[2]).sub_(shift(rest[2], reverse=True))


def _form_by_halving(wrt: str, x: Tensor, y: Tensor, levels: Levels, strict: bool) -> Tensor:
    if wrt == "P":
        c = levels.g.shape[-2]
        out = _zeros((c, c), x, y, levels.g)
        if not strict:
            out.diagonal(dim1=-2, dim2=-1).copy_((x * y).sum(-1))
        for s, up, down in levels.blocks:
            _corner(out, s).copy_((_upper(x, s) * up) @ (_lower(y, s) * down).mT)
        return out
    p, z = x, y
    out = _zeros(z.shape[-2:], p, z, levels.g)
    if not strict:
        out += p.diagonal(dim1=-2, dim2=-1)[..., None] * z
    for s, up, down in levels.blocks:
        if wrt == "X":
            _upper(out, s).add_(up * (_corner(p, s) @ (_lower(z, s) * down)))
        else:
            _lower(out, s).add_(down * (_corner(p, s).mT @ (_upper(z, s) * up)))
    return out


def _form_grads_by_halving(p: Tensor, x: Tensor, y: Tensor, levels: Levels) -> tuple[Tensor, Tensor, Tensor]:
    """Of the part below the diagonal; dg sums pairs and subtracts nothing."""
    dx, dy = (_zeros(t.shape[-2:], p, x, y, levels.g) for t in (y, x))
    ups, downs = [], []
    for s, up, down in levels.blocks:
        corner, xs, ys = _corner(p, s), _upper(x, s) * up, _lower(y, s) * down
        to_x, to_y = corner @ ys, corner.mT @ xs
        ups.append(xs * to_x)
        downs.append(ys * to_y)
        _upper(dx, s).add_(up * to_x)
        _lower(dy, s).add_(down * to_y)
    return dx, dy, levels.gate(ups, downs)


def _zeros(size: tuple[int, ...], *tiles: Tensor) -> Tensor:
    """Zeros for a result of these tiles, which may be shared by all sequences or heads (a leading size of 1)."""
    return tiles[0].new_zeros((*torch.broadcast_shapes(*(t.shape[:-2] for t in tiles)), *size))


def _halves(x: Tensor, h: int, c: int) -> tuple[Tensor, Tensor]:
    """Even and odd blocks: (…, C/h, rows, D) to two of (…, C/2h, rows, D)."""
    pair = x.unflatten(-3, (c // (2 * h), 2))
    return pair.select(-3, 0), pair.select(-3, 1)


def _upper(x: Tensor, s: int) -> Tensor:
    return x.unflatten(-2, (x.shape[-2] // s, 2, s // 2)).select(-3, 1)


def _lower(x: Tensor, s: int) -> Tensor:
    return x.unflatten(-2, (x.shape[-2] // s, 2, s // 2)).select(-3, 0)


def _corner(p: Tensor, s: int) -> Tensor:
    """The (upper rows, lower columns) quarter of each diagonal block of size s: (…, C/s, s/2, s/2)."""
    c, h = p.shape[-1], s // 2
    blocks = p.unflatten(-1, (c // s, s)).unflatten(-3, (c // s, s))
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)[..., h:, :h]


def _assemble(pair: Tensor, corner: Tensor) -> Tensor:
    """Diagonal blocks of half size (…, C/s, 2, h, h) and their lower-left corners to blocks (…, C/s, s, s)."""
    a, b = pair.select(-3, 0), pair.select(-3, 1)
    top = torch.cat([a, torch.zeros_like(corner)], -1)
    return torch.cat([top, torch.cat([corner, b], -1)], -2)


class Dense:
    """Tiling of equally long sequences: chunk n holds the tokens nC … nC + C − 1, the last one padded with zeros."""

    reset_forward: Tensor | None = None
    reset_reverse: Tensor | None = None

    def __init__(self, tokens: int, chunk: int, device: torch.device) -> None:
        self.t, self.c = tokens, chunk
        self.n = (tokens + chunk - 1) // chunk
        rows = torch.arange(self.n * chunk, device=device).view(self.n, 1, 1, chunk, 1)
        self.rows = rows < tokens
        self.full = isinstance(tokens, int) and tokens % chunk == 0  # no guard on symbolic sizes

    def tile(self, x: Tensor) -> Tensor:
        """(B, T, H, D) → (N, B, H, C, D), contiguous, so that no product copies it."""
        if not self.full:
            x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, self.n * self.c - self.t))
        return x.unflatten(1, (self.n, self.c)).permute(1, 0, 3, 2, 4).contiguous()

    def untile(self, x: Tensor) -> Tensor:
        """(N, B, H, C, …) → (B, T, H, …)."""
        rows = self._rows(x)
        if self.full:
            return rows
        return rows.index_select(1, torch.arange(self.t, device=x.device))  # of a slice a tracer asks if it is contiguous

    def _rows(self, x: Tensor) -> Tensor:
        return x.movedim((1, 0, 3, 2), (0, 1, 2, 3)).flatten(1, 2)

    def valid(self, x: Tensor) -> Tensor:
        return x if self.full else torch.where(self.rows, x, torch.zeros_like(x))


class Shifted(Dense):
    """Tiling of equally long sequences of which some go on within a chunk: `lead` (B,) rows before their first token."""

    def __init__(self, tokens: int, chunk: int, lead: Tensor) -> None:
        self.t, self.c, self.full = tokens, chunk, False
        self.n = (tokens + 2 * chunk - 2) // chunk
        index = torch.arange(self.n * chunk, device=lead.device) - lead[:, None]
        there = (index >= 0) & (index < tokens)
        self.rows = there.unflatten(1, (self.n, chunk)).movedim(1, 0)[:, :, None, :, None]
        self.index = torch.where(there, index, tokens)
        self.place = lead[:, None] + torch.arange(tokens, device=lead.device)

    def tile(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        return self._pick(x, self.index).unflatten(1, (self.n, self.c)).permute(1, 0, 3, 2, 4).contiguous()

    def untile(self, x: Tensor) -> Tensor:
        return self._pick(self._rows(x), self.place)

    def _pick(self, x: Tensor, index: Tensor) -> Tensor:
        return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


class Packed(Dense):
    """Tiling of packed sequences (B = 1): every sequence starts a chunk of its own, `lead` (N,) rows before its first token;
    unused chunks are empty."""

    def __init__(self, tokens: int, chunk: int, cu_seqlens: Tensor, lead: Tensor | None = None) -> None:
        device, cu = cu_seqlens.device, cu_seqlens.long()
        self.t, self.c, self.full = tokens, chunk, False
        lengths = cu[1:] - cu[:-1]
        before = torch.zeros_like(lengths) if lead is None else lead
        counts = (lengths + before + chunk - 1) // chunk
        ends = counts.cumsum(0)
        self.n = tokens // chunk + (1 if lead is None else 2) * lengths.shape[0]
        chunks = torch.arange(self.n, device=device)
        last = torch.minimum(chunks, ends[-1] - 1)  # chunks behind the end repeat the owner of the last real one
        owner = torch.searchsorted(ends, last, right=True).clamp(max=lengths.shape[0] - 1)
        first = ends[owner] - counts[owner]
        start = cu[:-1][owner] - before[owner] + (chunks - first) * chunk
        index = start[:, None] + torch.arange(chunk, device=device)
        there = (index >= cu[:-1][owner][:, None]) & (index < cu[1:][owner][:, None]) & (chunks < ends[-1])[:, None]
        self.rows = there[:, None, None, :, None]
        self.index = torch.where(there, index, tokens)
        spare = chunks >= ends[-1]  # nothing follows them, and in reverse nothing precedes: identity on no sequence
        self.reset_forward = torch.where((chunks == first) & ~spare, owner, -1 - owner)
        self.reset_reverse = torch.where((chunks == ends[owner] - 1) & ~spare, owner, -1 - owner)
        token = torch.arange(tokens, device=device)
        seq = torch.searchsorted(cu[1:].contiguous(), token, right=True).clamp(max=lengths.shape[0] - 1)
        self.place = (ends[seq] - counts[seq]) * chunk + before[seq] + token - cu[:-1][seq]

    def tile(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
        return x[:, self.index].permute(1, 0, 3, 2, 4).contiguous()

    def untile(self, x: Tensor) -> Tensor:
        return self._rows(x)[:, self.place]


NAMES: dict[str, Callable[..., object]] = {
    "cumsum": cumsum, "shift": shift, "mask": mask, "between": between, "crossing": crossing, "inverse": inverse, "add": add,
    "down": down, "far": far, "form": form, "form_grads": form_grads,
}
"""What generated source calls."""
