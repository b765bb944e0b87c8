"""Tile operations of the IR in Triton: what the generated kernels call.

Tiles are 2-d float32 tensors of shape (C or 1, D or 1). `DT` is the type of the matrix units' operands, that of the
inputs: float32 is computed exactly (`ieee`), 16-bit types are rounded at the operands and summed in float32.

The decay form works by halving (levels b = 1, 2, … with blocks of s = 2^b rows): in a block, a pair of i in the upper and
j in the lower half factors through the boundary between the halves. `reach` is the 0/1 matrix whose product with g is, for
an upper row i, the sum from the boundary up to i and, for a lower row j, the sum from behind j to the boundary: both are
sums of log decays, never differences, so that no factor exceeds 1. Its transpose carries the gradient back to g.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from lsmc.lowering.backends.triton_early import MARK

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
EARLY = tl.constexpr(MARK)


@triton.jit
def exp(x):
    """e^x in two instructions, 0 where that is no normal number: `tl.exp` takes three more to scale such results."""
    if INTERPRETED:
        out = tl.exp(x)
    else:
        out = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32,
                                        is_pure=True, pack=1)
    return out


@triton.jit
def power(x):
    """2^x in one instruction."""
    if INTERPRETED:
        out = tl.exp2(x)
    else:
        out = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return out


@triton.jit
def beside(x, WIDE: tl.constexpr):
    """Offsets of which the compiler knows only that this many columns lie side by side: a thread takes so many of a tile.

    It would lay the tile out for the widest loads, and all that the tile meets alike. They are worked out where they are wanted:
    a loop does not hold them.
    """
    if INTERPRETED:
        out = x
    else:
        out = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=False, pack=1)
        out = tl.max_contiguous(tl.multiple_of(out, [1, WIDE]), [1, max(2, WIDE)])
    return out


@triton.jit
def ahead(rows, inside, FIRST, COLUMNS: tl.constexpr, END: tl.constexpr):
    """Ask for these columns of rows, where `inside`, to be brought to the L2 cache: one request for each 128 bytes."""
    if not INTERPRETED:
        LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
        at = tl.arange(0, (COLUMNS + LINE - 1) // LINE)[None, :] * LINE + FIRST
        tl.inline_asm_elementwise("{ .reg .pred %p; setp.ne.s32 %p, $2, 0; @%p prefetch.global.L2 [$1]; mov.b32 $0, 0; }", "=r,l,r",
                                  [rows + at, (inside & (at < END)).to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def _asked():
    """Whether the kernel that is compiled here can have its loads under way early. Inductor copies this into modules of its own."""
    from lsmc.lowering.backends import triton_early
    return triton_early.ask()


@triton.jit
def early(ROOM: tl.constexpr):
    """Have copies of the tiles that are loaded below under way as early as these kilobytes have room for them (`triton_early`)."""
    if not INTERPRETED:
        if _asked():
            tl.inline_asm_elementwise(EARLY, "=r,r", [tl.full([], ROOM * 1024, tl.int32)], dtype=tl.int32, is_pure=False,
                                      pack=1)


@triton.jit
def nothing(ROWS: tl.constexpr, COLUMNS: tl.constexpr, length):
    """Zeros of which no compiler knows that they are, nor that they are alike, from a length: equal numbers are copied where a loop
    may have no step, and for such copies the assembler makes each product of the loop wait for the one before (C7515)."""
    place = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return tl.minimum(place + length, 0).to(tl.float32)


@triton.jit
def again(x):
    """The same numbers, of which the compiler does not know that: what was stored of them is on its way then. Else it writes the
    operand of a product into shared memory before the store has left its own there, and has room for one program less."""
    if INTERPRETED or x.dtype == tl.float32:
        out = x
    else:
        out = tl.inline_asm_elementwise("// $0", "=r,0", [x], dtype=x.dtype, is_pure=False, pack=2)
    return out


@triton.jit
def dot(a, b, DT: tl.constexpr):
    """a @ b on the matrix units."""
    if tl.float32 == DT:
        out = tl.dot(a, b, input_precision="ieee")
    else:
        out = tl.dot(a.to(DT), b.to(DT))
    return out


@triton.jit
def exact_dot(a, b, DT: tl.constexpr):
    """a @ b to nearly float32 precision."""
    if tl.float32 == DT:
        out = tl.dot(a, b, input_precision="ieee")
    else:
        out = tl.dot(a, b, input_precision="tf32x3")
    return out


@triton.jit
def half_dot(a, b, DT: tl.constexpr):
    """a @ b with half of float32's digits, and all of its range, where the inputs have 16 bits."""
    if tl.float32 == DT:
        out = tl.dot(a, b, input_precision="ieee")
    else:
        out = tl.dot(a, b, input_precision="tf32")
    return out


@triton.jit
def across(x, DT: tl.constexpr):
    """The sum of each row. Of at least as many columns as a warp has threads it is taken on the matrix units, where the inputs have
    16 bits: among threads it takes a step for each halving of the columns."""
    if tl.float32 == DT or x.shape[1] < 32:
        out = tl.sum(x, axis=1, keep_dims=True)
    else:
        y = half_dot(x, tl.full([x.shape[1], 8], 1.0, tl.float32), DT)
        out = tl.sum(tl.where(tl.arange(0, 8)[None, :] == 0, y, 0.0), axis=1, keep_dims=True)
    return out


@triton.jit
def select_dot(m, x, DT: tl.constexpr, EXACT: tl.constexpr = False):
    """M @ x for a mask M (0/1 exactly): x in two pieces keeps 15 bits of each summand, or is of the type DT already."""
    if EXACT and tl.float32 != DT:
        out = tl.dot(m.to(DT), x.to(DT))
    elif tl.bfloat16 == DT:
        bits = x.to(tl.int32, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        low = (x - (bits & -65536).to(tl.float32, bitcast=True)).to(tl.bfloat16)
        one = m.to(tl.bfloat16)
        out = tl.dot(one, low)
        out = tl.dot(one, high, out)
    else:
        out = exact_dot(m.to(tl.float32), x, DT)
    return out


@triton.jit
def keep(x, mask, ON: tl.constexpr):
    """x where the mask holds, if the extent needs padding at all."""
    if ON:
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit
def running(x, DT: tl.constexpr, EXACT: tl.constexpr = False):
    """Sums over the rows up to and with each."""
    C: tl.constexpr = x.shape[0]
    return select_dot(tl.arange(0, C)[None, :] <= tl.arange(0, C)[:, None], x, DT, EXACT)


@triton.jit
def total(x):
    """The sum over the rows of a column, as a 1×1 tile. A column as it is would be held whole by every thread."""
    return tl.reshape(tl.sum(tl.reshape(x, [x.shape[0]]), axis=0, keep_dims=True), [1, 1])


@triton.jit
def tokens(row, first, end, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr):
    """How many of the rows first … end − 1 there are up to a row, or from it on; without the row itself, if exclusive."""
    here = row + (REVERSE == EXCLUSIVE)
    here = tl.minimum(tl.maximum(here, first), end)
    if REVERSE:
        count = end - here
    else:
        count = here - first
    return count.to(tl.float32)


@triton.jit
def _behind(before_a, last_a, before_b, last_b):
    """Of two runs of rows: the sum of all rows but the last, and the last."""
    return before_a + last_a + before_b, last_b


@triton.jit
def cumsum(x, REVERSE: tl.constexpr, EXCLUSIVE: tl.constexpr, DT: tl.constexpr):
    """Running sum over the rows without a difference of sums."""
    C: tl.constexpr = x.shape[0]
    if x.shape[1] == 1:
        x = tl.reshape(x, [C])
        if EXCLUSIVE:
            y, _ = tl.associative_scan((tl.zeros_like(x), x), 0, _behind, reverse=REVERSE)
        else:
            y = tl.cumsum(x, axis=0, reverse=REVERSE)
        y = y[:, None]
    else:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        if REVERSE:
            i, j = -i, -j
        if EXCLUSIVE:
            m = j < i
        else:
            m = j <= i
        y = select_dot(m, x, DT)
    return y


@triton.jit
def lower(x, STRICT: tl.constexpr):
    """The (strictly) lower triangle of a square tile."""
    i = tl.arange(0, x.shape[0])[:, None]
    j = tl.arange(0, x.shape[0])[None, :]
    if STRICT:
        m = j < i
    else:
        m = j <= i
    return tl.where(m, x, 0.0)


@triton.jit
def between(g, STRICT: tl.constexpr, BEFORE: tl.constexpr, DT: tl.constexpr):
    """exp(sum of g over (j, i]) for j < i (j <= i unless strict), else 0; (j, i) when `before`."""
    i = tl.arange(0, g.shape[0])[:, None]
    j = tl.arange(0, g.shape[0])[None, :]
    if tl.float32 == DT:  # sums of up to 64 terms without a difference
        s = tl.cumsum(tl.where(j < i, tl.broadcast_to(g, [g.shape[0], g.shape[0]]), 0.0), axis=0)
        if BEFORE:
            s = s - tl.where(j < i, g, 0.0)
    else:
        total = cumsum(g, False, False, DT)
        s = total - tl.trans(total)
        if BEFORE:
            s = tl.where(j < i, s - g, 0.0)
    if STRICT:
        m = j < i
    else:
        m = j <= i
    return tl.where(m, exp(tl.minimum(s, 0.0)), 0.0)  # so that both triangles take the same exponentials


@triton.jit
def between_grad(w, BEFORE: tl.constexpr, DT: tl.constexpr):
    """dg_l = sum of W_ij over j < l <= i (l < i when `before`)."""
    C: tl.constexpr = w.shape[0]
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if tl.float32 == DT:
        if BEFORE:
            later = exact_dot((j > i).to(tl.float32), w, DT)
        else:
            later = exact_dot((j >= i).to(tl.float32), w, DT)
        out = tl.sum(tl.where(j < i, later, 0.0), axis=1, keep_dims=True)
    else:  # rows up to l less columns up to l: the pairs that end before l cancel exactly
        w = tl.where(j < i, w, 0.0)
        rows = tl.sum(w, axis=1)
        out = tl.cumsum(rows - tl.sum(w, axis=0), axis=0, reverse=True)
        if BEFORE:
            out = out - rows
        out = out[:, None]
    return out


@triton.jit
def pairs(b, C: tl.constexpr):
    """Upper row i and lower column j of the same block of 2^b rows."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    return ((i >> b) == (j >> b)) & (((i >> (b - 1)) & 1) == 1) & (((j >> (b - 1)) & 1) == 0)


@triton.jit
def reach(b, C: tl.constexpr, BEFORE: tl.constexpr):
    """Entry (i, l): the log decay of l is on the way from row i to the boundary of its block of 2^b rows."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if BEFORE:
        up = j < i
    else:
        up = j <= i
    half = (i >> (b - 1)) == (j >> (b - 1))
    upper = ((i >> (b - 1)) & 1) == 1
    return half & ((upper & up) | ((((i >> (b - 1)) & 1) == 0) & (j > i)))


@triton.jit
def reached(b, C: tl.constexpr, BEFORE: tl.constexpr):
    """The transpose of `reach`."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    if BEFORE:
        up = i < j
    else:
        up = i <= j
    half = (i >> (b - 1)) == (j >> (b - 1))
    upper = ((j >> (b - 1)) & 1) == 1
    return half & ((upper & up) | ((((j >> (b - 1)) & 1) == 0) & (i > j)))


@triton.jit
def diagonal(p):
    """The diagonal of a square tile as a column."""
    i = tl.arange(0, p.shape[0])[:, None]
    j = tl.arange(0, p.shape[0])[None, :]
    return tl.sum(tl.where(i == j, p, 0.0), axis=1, keep_dims=True)


@triton.jit
def column(x, at):
    """One column of a tile."""
    return tl.sum(tl.where(tl.arange(0, x.shape[1])[None, :] == at, x, 0.0), axis=1, keep_dims=True)


@triton.jit
def halved_p(x, y, g, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr):
    """P_ij = sum over d of X_id Y_jd exp(sum of g_d over (j, i])."""
    C: tl.constexpr = x.shape[0]
    out = tl.zeros([C, C], tl.float32)
    if not STRICT:
        i = tl.arange(0, C)[:, None]
        j = tl.arange(0, C)[None, :]
        out = tl.where(i == j, tl.sum(x * y, axis=1, keep_dims=True), out)
    for b in range(1, LEVELS + 1):
        e = exp(select_dot(reach(b, C, BEFORE), g, DT))
        out += tl.where(pairs(b, C), dot(x * e, tl.trans(y * e), DT), 0.0)
    return out


@triton.jit
def halved_x(p, y, g, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr):
    """X_id = sum over j of P_ij Y_jd exp(sum of g_d over (j, i])."""
    C: tl.constexpr = p.shape[0]
    out = tl.zeros([C, y.shape[1]], tl.float32)
    if not STRICT:
        out = diagonal(p) * y
    for b in range(1, LEVELS + 1):
        e = exp(select_dot(reach(b, C, BEFORE), g, DT))
        out += e * dot(tl.where(pairs(b, C), p, 0.0), y * e, DT)
    return out


@triton.jit
def halved_y(p, x, g, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr):
    """Y_jd = sum over i of P_ij X_id exp(sum of g_d over (j, i])."""
    C: tl.constexpr = p.shape[0]
    out = tl.zeros([C, x.shape[1]], tl.float32)
    if not STRICT:
        out = diagonal(p) * x
    for b in range(1, LEVELS + 1):
        e = exp(select_dot(reach(b, C, BEFORE), g, DT))
        out += e * dot(tl.trans(tl.where(pairs(b, C), p, 0.0)), x * e, DT)
    return out


@triton.jit
def halved_all(p, x, y, g, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, DT: tl.constexpr):
    """The three partial derivatives of the same operands at once: the factors of a level are made once."""
    C: tl.constexpr = p.shape[0]
    dx = tl.zeros([C, y.shape[1]], tl.float32)
    dy = tl.zeros([C, y.shape[1]], tl.float32)
    dg = tl.zeros([C, y.shape[1]], tl.float32)
    if not STRICT:
        d = diagonal(p)
        dx = d * y
        dy = d * x
    for b in range(1, LEVELS + 1):
        e = exp(select_dot(reach(b, C, BEFORE), g, DT))
        q = tl.where(pairs(b, C), p, 0.0)
        ax = e * dot(q, y * e, DT)
        ay = e * dot(tl.trans(q), x * e, DT)
        dx += ax
        dy += ay
        dg += select_dot(reached(b, C, BEFORE), x * ax + y * ay, DT)
    return dx, dy, dg


@triton.jit
def mild(s, DT: tl.constexpr):
    """Whether exp(-s) of the running log decays s is far from overflow in DT."""
    if tl.float16 == DT:
        out = tl.min(s) > -8.0
    else:
        out = tl.min(s) > -80.0
    return out


@triton.jit
def all_set(flags, stride, count):
    """Whether so many flags are set: many at a time, for a loop would wait for each."""
    out = tl.full([], 1, tl.int32)
    for first in range(0, count, 256):
        at = first + tl.arange(0, 256)
        out = tl.minimum(out, tl.min(tl.load(flags + at * stride, mask=at < count, other=1)))
    return out != 0


# How a form is computed, `HOW`: in one product, for mild decays only (0); by halving (1); whichever the decays ask for (2).


@triton.jit
def form_p(x, y, g, s, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, HOW: tl.constexpr, DT: tl.constexpr):
    """P_ij = sum over d of X_id Y_jd exp(sum of g_d over (j, i]); s is the running sum of g."""
    if HOW == 0:
        out = lower(dot(x * since(s, g, BEFORE), tl.trans((y * exp(-s)).to(DT)), DT), STRICT)
    elif HOW == 1:
        out = halved_p(x, y, g, STRICT, BEFORE, LEVELS, DT)
    elif mild(s, DT):
        out = form_p(x, y, g, s, STRICT, BEFORE, LEVELS, 0, DT)
    else:
        out = form_p(x, y, g, s, STRICT, BEFORE, LEVELS, 1, DT)
    return out


@triton.jit
def form_x(p, y, g, s, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, HOW: tl.constexpr, DT: tl.constexpr):
    """X_id = sum over j of P_ij Y_jd exp(sum of g_d over (j, i])."""
    if HOW == 0:
        out = since(s, g, BEFORE) * dot(lower(p, STRICT), y * exp(-s), DT)
    elif HOW == 1:
        out = halved_x(p, y, g, STRICT, BEFORE, LEVELS, DT)
    elif mild(s, DT):
        out = form_x(p, y, g, s, STRICT, BEFORE, LEVELS, 0, DT)
    else:
        out = form_x(p, y, g, s, STRICT, BEFORE, LEVELS, 1, DT)
    return out


@triton.jit
def form_y(p, x, g, s, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, HOW: tl.constexpr, DT: tl.constexpr):
    """Y_jd = sum over i of P_ij X_id exp(sum of g_d over (j, i])."""
    if HOW == 0:
        out = exp(-s) * dot(tl.trans(lower(p, STRICT).to(DT)), x * since(s, g, BEFORE), DT)
    elif HOW == 1:
        out = halved_y(p, x, g, STRICT, BEFORE, LEVELS, DT)
    elif mild(s, DT):
        out = form_y(p, x, g, s, STRICT, BEFORE, LEVELS, 0, DT)
    else:
        out = form_y(p, x, g, s, STRICT, BEFORE, LEVELS, 1, DT)
    return out


@triton.jit
def form_gate(p, x, y, g, s, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, HOW: tl.constexpr,
              DT: tl.constexpr):
    """dg_l = sum over the pairs j < l <= i (l < i when `before`) of P X Y and their decay."""
    _, _, out = form_all(p, x, y, g, s, STRICT, BEFORE, LEVELS, HOW, DT)
    return out


@triton.jit
def form_all(p, x, y, g, s, STRICT: tl.constexpr, BEFORE: tl.constexpr, LEVELS: tl.constexpr, HOW: tl.constexpr,
             DT: tl.constexpr):
    """`form_x`, `form_y` and `form_gate` of the same operands at once."""
    if HOW == 0:
        e = since(s, g, BEFORE)
        xe = (x * e).to(DT)
        ye = (y * exp(-s)).to(DT)
        q = lower(p, STRICT).to(DT)
        ax = dot(q, ye, DT)
        ay = dot(tl.trans(q), xe, DT)
        dx = e * ax
        dy = exp(-s) * ay
        # a pair adds to the rows l <= i and takes from the rows l <= j what cancels exactly: both use the rounded factors
        up = xe.to(tl.float32) * ax
        dg = later(up - ye.to(tl.float32) * ay, DT)
        if BEFORE:
            dg -= up
    elif HOW == 1:
        dx, dy, dg = halved_all(p, x, y, g, STRICT, BEFORE, LEVELS, DT)
    elif mild(s, DT):
        dx, dy, dg = form_all(p, x, y, g, s, STRICT, BEFORE, LEVELS, 0, DT)
    else:
        dx, dy, dg = form_all(p, x, y, g, s, STRICT, BEFORE, LEVELS, 1, DT)
    return dx, dy, dg


@triton.jit
def since(s, g, BEFORE: tl.constexpr):
    """The decay from the chunk's start up to (and with, unless `before`) each row."""
    if BEFORE:
        s = s - g
    return exp(s)


@triton.jit
def later(x, DT: tl.constexpr):
    """Sums over each row and the rows behind it."""
    C: tl.constexpr = x.shape[0]
    return select_dot(tl.arange(0, C)[None, :] >= tl.arange(0, C)[:, None], x, DT)


@triton.jit
def inverse(a, LEVELS: tl.constexpr, DT: tl.constexpr):
    """(I + L)^-1 of a strictly lower L by recursive block inversion. Blocks of 16 rows on the diagonal, up to four levels, are a
    warp's own: their products take no shared memory and wait for no other warp."""
    C: tl.constexpr = a.shape[0]
    N: tl.constexpr = C // 16
    own = tl.arange(0, N)[:, None, None, None] == tl.arange(0, N)[None, None, :, None]
    blocks = tl.sum(tl.where(own, tl.reshape(a, [N, 16, N, 16]), 0.0), axis=2)
    i = tl.arange(0, 16)[:, None]
    j = tl.arange(0, 16)[None, :]
    y = tl.where((i == j)[None, :, :], 1.0, 0.0) - tl.where(pairs(1, 16)[None, :, :], blocks, 0.0)
    for b in tl.static_range(2, 5):
        y -= half_dot(y, half_dot(tl.where(pairs(b, 16)[None, :, :], blocks, 0.0), y, DT), DT)
    x = tl.reshape(tl.where(own, y[:, :, None, :], 0.0), [C, C])
    for b in tl.static_range(5, LEVELS + 1):
        x -= half_dot(x, half_dot(tl.where(pairs(b, C), a, 0.0), x, DT), DT)
    return x
