"""The sections of numbers: schedules, kernels, work per token, laws, and what the page was made with."""

from __future__ import annotations

import html
import math
import platform
import re
from collections.abc import Iterable, Sequence

import sympy
import torch

from lsmc import laws
from lsmc.explanation.costs import Candidate, Failure, assembler
from lsmc.explanation.pieces import changed, code, details, dot, duration, meter, section
from lsmc.explanation.subject import WAYS, Subject, kernels_of
from lsmc.lowering.backends.triton_sums import gather
from lsmc.lowering.tuned.store import describe
from lsmc.runtime.pages import WIDTH, legend, rect, svg, table, table_rows, text, ticks, upright
from lsmc.schedules.base import DOUBT
from lsmc.target import H200

LEFT, RIGHT = 96, 76
"""What bars leave for names and times."""


def _axis(most: float, height: float) -> list[str]:
    """Lines and numbers under bars of up to `most` seconds."""
    out = []
    for at in ticks(0.0, most * 1e6, 6):
        x = _px(at * 1e-6, most)
        out += [upright(x, 4, height - 20), text(x, height - 6, f"{at:g}", "middle")]
    return out


def _px(seconds: float, most: float) -> float:
    return LEFT + seconds / most * (WIDTH - LEFT - RIGHT)


# -- schedules --------------------------------------------------------------------------------------------------------


def schedules(s: Subject) -> str:
    said = ("A program is cut into kernels where a memory crosses from chunk to chunk. Every cut was estimated for "
            f"{s.sizes()}, on an {H200.name} in bfloat16; the shortest won, or of those within {DOUBT:.0%} of it the one with "
            "the fewest launches.")
    parts = []
    for way, direction in s.directions.items():
        found = s.candidates[way]
        parts.append(f"<h3>{WAYS[way].capitalize()}</h3>{_bars(s, way)}{why(found)}{_launches(found[0])}")
        parts.append(_kept(s) if way == "f" else "")
        if direction.target == "triton" and (measured := describe(direction.executable.hash).strip()):
            parts.append(details("Measured times", f"<pre>{html.escape(measured)}</pre>"))
    return section("schedule", "Schedule", "".join(parts), said)


def _kept(s: Subject) -> str:
    """What the forward hands to the backward, if anything."""
    lines = s.trail.kept()
    if not lines:
        return ""
    alone = s.explanation.plan.forward.choice
    return ("<p class='said'>It keeps for the backward what would be worked out again there, under these numbers, because that was "
            f"estimated to pay. Where no gradient is wanted it keeps nothing, and takes {duration(alone.seconds)} by "
            f"<b>{alone.schedule.name}</b>.</p>{code(lines, whole=True)}")


def _bars(s: Subject, way: str) -> str:
    """Each candidate as a bar made of its kernels."""
    found, colours, row = s.candidates[way], s.colours(way), 26
    most, height = max(c.seconds for c in found), 28 + row * len(found)
    out = _axis(most, height)
    for n, c in enumerate(found):
        y, at, strong = 4 + n * row, 0.0, "class='strong'" * (n == 0)
        out.append(text(LEFT - 10, y + 16, c.schedule.name, "end", strong))
        out.append(rect(_px(0, most), y + 4, _px(c.seconds, most) - LEFT, row - 9, "var(--card)", 1))
        for launch in c.launches:
            left, right = _px(at, most), _px(at + launch.seconds, most)
            words = f"{launch.name}: {duration(launch.seconds)}, {launch.bytes / 1e6:,.0f} MB, limited by {launch.limit}"
            out.append(rect(left, y + 4, right - left - 1, row - 9, colours[launch.name], 0.45 if n else 0.95, words))
            at += launch.seconds
        out.append(text(_px(at, most) + 6, y + 16, duration(at), "start", strong))
    return svg(height, f"estimated time of {WAYS[way]} by schedule", out) + legend(colours.items(), "microseconds, estimated")


def why(found: Sequence[Candidate]) -> str:
    """Why the first was chosen, and what each of the others would have cost."""
    best, *others = found
    lines = [f"<b>{best.schedule.name}</b> was chosen, at {duration(best.seconds)}."]
    for other in others:
        if other.schedule.kernels == best.schedule.kernels:
            lines.append(f"<b>{other.schedule.name}</b> cuts this program in the same way.")
            continue
        known = {launch.name: launch.seconds for launch in best.launches}
        worst = max(other.launches, key=lambda launch: launch.seconds - known.get(launch.name, 0.0))
        more = sum(x.bytes for x in other.launches) - sum(x.bytes for x in best.launches)
        late = other.seconds - best.seconds
        than = "longer" if late >= 0 else "less, with more launches"
        lines.append(f"<b>{other.schedule.name}</b> would take {duration(abs(late))} {than} ({abs(late) / best.seconds:.1%}): "
                     f"its {worst.name} alone takes {duration(worst.seconds)}, limited by {worst.limit}; it moves "
                     f"{abs(more) / 1e6:,.0f} MB {'more' if more >= 0 else 'less'}.")
    return f"<p class='said'>{' '.join(lines)}</p>"


def _launches(chosen: Candidate) -> str:
    """The kernels of the chosen schedule: what they do and what that is estimated to take."""
    kernels = {k.name: k for k in chosen.schedule.kernels}
    rows = []
    for launch in chosen.launches:
        kernel = kernels.get(launch.name) or kernels.get(launch.name.rpartition("_")[0])
        over = "pairs of tokens, of all chunks at once" if launch.name.endswith("_pairs") else "all chunks at once"
        does = ("once for all: decays, and products of pairs of tokens" if kernel is None
                else f"scans {', '.join(kernel.carries)}" if kernel.carries else over)
        rows.append([launch.name, does, duration(launch.seconds), f"{launch.bytes / 1e6:,.0f} MB", launch.limit,
                     "" if launch.registers is None else str(launch.registers)])
    header = ["kernel", "does", "estimated", "moves", "limited by", "registers wanted"]
    keep = [n for n in range(len(header)) if any(row[n] for row in rows)]
    return table([header[n] for n in keep], [[row[n] for n in keep] for row in rows])


# -- kernels ----------------------------------------------------------------------------------------------------------


def kernels(s: Subject) -> str:
    parts = []
    without = [w for w, d in s.directions.items() if d.target != "triton"]
    if without:
        rule = s.explanation.plan.lacking
        why_not = f" The rule: {html.escape(rule)}." if rule else ""
        parts.append(f"<p class='note'>The {' and the '.join(WAYS[w] for w in without)} program runs as ATen operations, on every "
                     f"device: there is no kernel to compile for sm_90.{why_not}</p>")
    if len(without) < len(s.directions):
        parts.append(f"<p class='note bad'>Nothing was compiled for sm_90: {html.escape(s.found.obstacle)}.</p>" if s.found.obstacle
                     else _taken(s))
    for way, direction in s.directions.items():
        parts.append(f"<h3>{WAYS[way].capitalize()}</h3>")
        if direction.target != "triton":
            parts.append(details("<code>run</code>", code(s.trail.source(way, direction.executable.source, "aten"), 1)))
        else:
            said = ("Before kernels were cut, sums were taken together: one pass over the rows for what is added, and row sums "
                    "where they need the least")
            parts.append(changed(s.trail.program(way), gather(s.trail.program(way)), said))
        for kernel in kernels_of(direction):
            lines = s.trail.source(way, kernel.source.strip("\n"), "triton")
            head = f"{dot(s.colours(way).get(kernel.kernel.name, 'var(--f)'))} <code>{kernel.name}</code>"
            parts.append(details(f"{head} <span class='key'>{len(lines)} lines</span>", code(lines, 1)))
    said = ("Generated from the programs above, value by value: v13 is %13, h13 and the like are forms of it. In branches for mild "
            "decays (HOW == 0), and where sums were taken together, numbers are others; the marks follow.") if s.on_gpu else ""
    return section("kernels", "Kernels", "".join(parts), said)


def _taken(s: Subject) -> str:
    """What every kernel takes of an sm_90."""
    rows = []
    for way, direction in s.directions.items():
        for n, kernel in enumerate(kernels_of(direction)):
            r = s.found.kernels.get((way, n), Failure("not compiled"))
            short = kernel.name.removeprefix(s.canonical.name + "_")
            first = f"<td>{dot(s.colours(way).get(kernel.kernel.name, 'var(--f)'))} <code>{short}</code></td>"
            if isinstance(r, Failure):
                rows.append(f"<tr>{first}<td colspan='6' class='bad'>{html.escape(r.reason)}</td></tr>")
                continue
            spilled = f"<td class='num bad'>{r.spills:,} B</td>" if r.spills else "<td class='num'>–</td>"
            serial = f" <span class='bad' title='{html.escape(r.serial)}'>one at a time</span>" if r.serial else ""
            rest = "".join(f"<td class='num'>{x}</td>" for x in (f"{r.wgmma or '–'}{serial}", r.warps or "–", r.stages or "–"))
            rows.append(f"<tr>{first}{meter(r.registers / 255, str(r.registers))}{spilled}"
                        f"{meter(r.shared / H200.shared_bytes, f'{r.shared / 1024:.0f} KB')}{rest}</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("kernel", "registers", "spilled", "shared memory", "wgmma", "warps", "stages"))
    versions, trouble = assembler()
    said = (f"Compiled for sm_90a by {versions}, without a GPU: bfloat16, K = {s.shape.key}, V = {s.shape.value}, chunks of "
            f"{s.shape.chunk}. A thread has at most 255 registers, a block {H200.shared_bytes // 1024} KB of shared memory; "
            "what is spilled, here in bytes a thread, goes to memory. Products (wgmma) run one at a time where the assembler does "
            "not let them run on; hover for its reason.")
    said += f" Known of ptxas {html.escape(trouble)}." if trouble else ""
    return f"<div class='wide'><table class='taken'><tr>{head}</tr>{''.join(rows)}</table></div><p class='key'>{said}</p>"


# -- work and laws ----------------------------------------------------------------------------------------------------


def floor(s: Subject) -> str:
    tokens = s.tokens.values()
    rows = {
        "bytes that must move": (f"{t.least:,.0f}" for t in tokens),
        "bytes that the schedule moves": (f"{t.moved:,.0f} ({t.moved / t.least:.1f} ×)" for t in tokens),
        "operations in matrix products": (f"{t.products:,.0f}" for t in tokens),
        "elementwise operations": (f"{t.elementwise:,.0f}" for t in tokens),
        "matrix operations a byte that must move": (f"{t.products / t.least:.0f}" for t in tokens),
        "floor of all tokens": (f"{duration(t.floor)}, by {t.bound}" for t in tokens),
        "estimated": (f"{duration(t.predicted)} ({t.predicted / t.floor:.1f} ×)" for t in tokens),
    }
    said = ("Per token and head. What must move are inputs and outputs, once each, in bfloat16. An "
            f"{H200.name} copies {H200.bytes_per_s / 1e12:.2f} TB/s and multiplies {H200.flops_per_s / 1e12:.0f} TFLOP/s, both "
            f"measured: {H200.flops_per_s / H200.bytes_per_s:.0f} operations a byte keep both busy. The floor is the longer of the "
            f"two, for {s.sizes()}.")
    said += "" if s.on_gpu else " ATen operations are estimated as if kernels did them, to rank schedules: they take longer."
    shown = table(["", *(WAYS[w] for w in s.tokens)], [[label, *cells] for label, cells in rows.items()])
    return section("floor", "Work per token, against the floor", _floors(s) + shown, said)


def _floors(s: Subject) -> str:
    """The two floors of either direction, and the estimate."""
    row, total = 17, s.shape.sequences * s.shape.tokens
    kinds = {"least bytes, at full bandwidth": "var(--c)", "matrix products, at full rate": "var(--a)", "estimated": "var(--b)"}
    times = {w: (t.least * total / H200.bytes_per_s, t.products * total / H200.flops_per_s, t.predicted)
             for w, t in s.tokens.items()}
    most, height = max(max(group) for group in times.values()), 24 + len(times) * (3 * row + 12)
    out, y = _axis(most, height), 4.0
    for way, group in times.items():
        out.append(text(LEFT - 10, y + 1.5 * row + 4, WAYS[way], "end", "class='strong'"))
        for (label, colour), seconds in zip(kinds.items(), group):
            out.append(rect(LEFT, y + 2, _px(seconds, most) - LEFT, row - 5, colour, 0.9, f"{label}: {duration(seconds)}"))
            out.append(text(_px(seconds, most) + 6, y + 12, duration(seconds)))
            y += row
        y += 12
    return svg(height, "time of the least work and of the estimate", out) + legend(kinds.items(), "microseconds")


def tested(s: Subject) -> str:
    found = s.found.laws
    said = ("Tested in float64 on random sizes, gates and splits, then on every range of gates over several chunks. Errors are "
            f"relative; {laws.TOLERANCE:.0e} is allowed.")
    if not isinstance(found, laws.Report):
        shown = f"<p class='note bad'>{html.escape('Not tested.' if found is None else str(found)).replace(chr(10), '<br/>')}</p>"
        return section("laws", "Laws", shown, said)
    rows = []
    for law, tally in found.laws.items():
        doc = re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(" ".join((laws.LAWS[law].__doc__ or "").split())))
        doc += f" {tally.skipped} cases were left out: the memory grows without bound." if tally.skipped else ""
        part = (math.log10(tally.worst) + 18) / (math.log10(laws.TOLERANCE) + 18) if tally.worst > 1e-18 else 0.0
        rows.append(f"<tr><td class='ok'>✓</td><td><b>{law.replace('_', ' ')}</b><br/><span class='key'>{doc}</span>"
                    f"</td><td class='num'>{tally.cases}</td>{meter(part, f'{tally.worst:.0e}' if tally.worst else '–')}</tr>")
    head = "".join(f"<th>{h}</th>" for h in ("", "law", "cases", "worst error"))
    return section("laws", "Laws", f"<table class='laws'><tr>{head}</tr>{''.join(rows)}</table>", said)


def made(s: Subject) -> str:
    import lsmc

    rows: Iterable[tuple[str, str]] = (
        ("lsmc", lsmc.__version__), ("torch", torch.__version__), ("sympy", sympy.__version__),
        ("python", platform.python_version()), *([("kernels", assembler()[0])] * (not s.found.obstacle)),
    )  # fmt: skip
    return section("made", "Made with", f"<table>{table_rows(rows)}</table>")
