"""The command line. Each command imports what it needs when it runs."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tyro.conf import Positional, arg

Method = Annotated[Positional[str], arg(metavar="METHOD", help="a method of the zoo, or FILE.py:NAME")]


def list_() -> None:
    """The methods of the zoo: decay, update, state, what compiles them, what ranks that share a sequence exchange."""
    from lsmc import zoo
    from lsmc.lowering.plan import able
    from lsmc.summary import summary

    def backends(program: Any) -> list[str]:
        return [name for name in ("aten", "triton") if able(name, program) == name]

    rows = [summary(method.canonical, backends) for method in zoo.METHODS]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in rows[0]:
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(*map(escape, row.values()))
    _show(table)
    said = ("state, message: numbers per head; the message is what a rank that shares a sequence sends, whatever its length",
            "chunk form: products of pairs of tokens; solve, a triangular system beside them; scan, token by token")
    _console().print("\n[dim]" + "\n".join(said) + "[/]")


def explain(
    method: Method,
    /,
    stage: Annotated[str | None, arg(help="print this stage alone, `list` names them; with --mesh: before, after")] = None,
    shape: Annotated[str | None, arg(help="B,T,H,K,V at which schedules are weighed")] = None,
    out: Annotated[Path | None, arg(aliases=("-o",), help="write a page instead, with pictures, kernels and laws")] = None,
    mesh: Annotated[str | None, arg(help="a model on this mesh, such as sp=4,dp=2: what ranks exchange; drawn with --out")] = None,
    size: Annotated[str, arg(help="with --mesh, the model's configuration")] = "tiny",
    pattern: Annotated[str | None, arg(help="with --mesh, its layers, such as LLLN")] = None,
    batch: Annotated[int, arg(help="with --mesh, sequences in a step, on all ranks")] = 8,
    tokens: Annotated[int, arg(help="with --mesh, tokens in a sequence")] = 4096,
) -> None:
    """How a method is compiled: every stage from the declaration to the emitted code, and why this schedule."""
    from lsmc.errors import LsmNameError

    console = _console()
    ranks = None if mesh is None else _ranks(method, mesh, size, pattern, batch, tokens)
    if out is None and ranks is not None:
        _exchanges(ranks, stage)
        return
    explanation = _explanation(method, shape)
    if out is not None:
        console.print(escape(f"{explanation.html(out, ranks=ranks)} explains {explanation.name}"))
        return
    stages = explanation.stages()
    if stage == "list":
        for name in stages:
            console.print(escape(name))
        return
    if stage is not None and stage not in stages:
        raise LsmNameError(f"there is no stage {stage!r}\nhelp: the stages are {', '.join(stages)}")
    for name, text in stages.items():
        if stage is None:
            console.rule(f"[bold]{escape(name)}", align="left")
        if stage in (None, name):
            sys.stdout.write(text.rstrip("\n") + "\n")
            sys.stdout.flush()


def _ranks(method: str, mesh: str, size: str, pattern: str | None, batch: int, tokens: int) -> Any:
    """A model's graph on a mesh, without a rank of it."""
    import torch
    from torch._subclasses import FakeTensorMode

    from lsmc.explanation.ranks import Ranks, larger
    from lsmc.models import HybridMoE, config
    from lsmc.runtime.traffic import capture, parse, trace

    axes = parse(mesh)
    layers = {} if pattern is None else {"pattern": pattern}
    with FakeTensorMode():  # sizes without numbers
        model = HybridMoE(config(size, lsm=_resolve(method), **layers))
        text = torch.zeros(batch, tokens, dtype=torch.int64)
        said = f"One step of {size}, {model.config.pattern}, on a mesh of {mesh}: {batch} × {tokens:,} tokens, float32."
        return Ranks(capture(model, axes, text, text), axes, said, trace(model, text, text),
                     larger(lambda wider: capture(model, wider, text, text), axes))


def _exchanges(ranks: Any, stage: str | None) -> None:
    """What a rank receives: equal messages in one row; then on more ranks. Or the graph, `before` or `after`."""
    from lsmc.errors import LsmNameError
    from lsmc.explanation.ranks import listing
    from lsmc.runtime.traffic import totals, traffic

    if stage is not None:
        graphs = {"before": ranks.before, "after": ranks.module}
        if stage not in graphs:
            raise LsmNameError(f"there is no stage {stage!r} of a mesh\nhelp: the stages are {', '.join(graphs)}")
        sys.stdout.write(listing(graphs[stage], ranks.axes))
        return
    for title, (header, rows) in ((ranks.said, totals(traffic(ranks.module, ranks.axes))), ("On more ranks", ranks.larger)):
        table = Table(box=None, pad_edge=False, title_justify="left", title=escape(title))
        for column in header:
            numbers = "bytes" in column or column in ("times", "ranks")
            table.add_column(column, no_wrap=True, justify="right" if numbers else "left")
        for row in rows:
            table.add_row(*map(escape, row))
        _show(table)


def scaling(
    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="METHOD …", help="methods of the zoo, or FILE.py:NAME")],
    /,
    times: Annotated[tuple[Path, ...], arg(help="what one GPU takes: files of `lsmc bench … --against sdpa --out`, or of layers")],
    ranks: Annotated[tuple[int, ...], arg(help="how many share the sequence")] = (8, 64, 1024),
    tokens: Annotated[int, arg(help="of a sequence, on each rank")] = 65536,
    batch: Annotated[int, arg(help="sequences")] = 1,
    size: Annotated[str, arg(help="the model's configuration, whose layers these are")] = "a0.3b-2b",
    per_node: Annotated[int, arg(help="GPUs of a node")] = 8,
    nvlink: Annotated[float, arg(help="GB/s of a GPU in one direction, within a node")] = 450.0,
    network: Annotated[float, arg(help="GB/s of a GPU in one direction, between nodes")] = 50.0,
    markdown: Annotated[bool, arg(help="print the table as Markdown")] = False,
) -> None:
    """Simulate layers with as many tokens on every rank of `sp`: bytes from their graphs, times as measured on one GPU."""
    from lsmc.runtime import scaling as model

    machine = model.Machine(per_node=per_node, nvlink=nvlink * 1e9, network=network * 1e9)
    measured = [t for path in times for t in model.times(path)]
    rows, notes = [["layer", "ranks", "exchange", "MB received", "forward ms", "backward ms", "÷ one GPU", ""]], {}
    for name in (*methods, model.SOFTMAX):
        for many in ranks:
            layer = _layer(name, size, batch, tokens, many)
            operator, rest = (sum(x) * 1e3 for x in model.alone(layer, measured))
            more = f", {rest:.2f} ms of the rest of its layer" if rest else " (no time of a whole layer)"
            notes[layer.name] = f"{layer.name} on one GPU: {operator:.2f} ms of the operator{more}"
            for step in model.simulate(layer, measured, machine):
                there = [f"{x * 1e3:.2f}" for x in step.seconds or ()]
                share = [f"{sum(step.seconds) / step.alone:.2f}"] if step.seconds else ["–"] * 3
                rows.append([layer.name, str(many), step.way, f"{step.received / 1e6:,.1f}", *there, *share, step.note])
    _print(rows, markdown, f"{batch} × {tokens} tokens on each rank, {per_node} GPUs a node: simulated")
    _console().print(escape("\n".join(notes.values())))


def _print(rows: Sequence[Sequence[str]], markdown: bool, title: str) -> None:
    """A table whose first row is its header."""
    if markdown:
        header, *rest = rows
        sys.stdout.write("".join(f"| {' | '.join(row)} |\n" for row in (header, ["---"] * len(header), *rest)) + "\n")
        return
    table = Table(box=None, pad_edge=False, title=escape(title), title_justify="left")
    for column in rows[0]:
        table.add_column(column, no_wrap=True, justify="left" if column in ("layer", "exchange", "") else "right")
    for row in rows[1:]:
        table.add_row(*map(escape, row))
    _show(table)


def _layer(name: str, size: str, batch: int, tokens: int, ranks: int) -> Any:
    """What a mixer of a model asks of ranks with `tokens` each: its graphs, without weights."""
    import torch
    from torch._subclasses import FakeTensorMode

    from lsmc.models import config
    from lsmc.models.blocks import Attention, LinearMixer
    from lsmc.runtime.mesh import Axis
    from lsmc.runtime.scaling import SOFTMAX, Layer
    from lsmc.runtime.traffic import capture

    axis, before = Axis("sp", ranks, "sp"), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    with FakeTensorMode(), contextlib.ExitStack() as after:
        after.callback(torch.set_default_dtype, before)
        if name == SOFTMAX:
            mixer: torch.nn.Module = Attention(config(size))
        else:
            mixer = LinearMixer(config(size, lsm=(declared := _resolve(name))))
            name = declared.name

        def graph(axes: dict[str, Axis], ranks: int) -> Any:
            return capture(lambda x: mixer(x).sum(), axes, torch.zeros(batch, ranks * tokens, config(size).hidden))

        return Layer.read(name, graph({"sp": axis}, ranks), graph({}, 1), axis)


def check(
    method: Method,
    /,
    examples: Annotated[int, arg(help="random cases for each law")] = 20,
    seed: Annotated[int, arg(help="another seed draws other cases")] = 0,
) -> None:
    """Test a declaration: its compiled forms against the recurrence, on random sizes, gates and splits."""
    from lsmc.laws import check as check_declaration

    declaration = _resolve(method)
    report = check_declaration(declaration, examples=examples, seed=seed, progress=True)
    _console().print(escape(str(report)))


def doctor() -> None:
    """Versions, GPU, compilers: what works on this machine and what to change."""
    from lsmc.runtime.doctor import diagnose

    marks = {"ok": "[green]✓[/]", "info": "[blue]·[/]", "warn": "[yellow]![/]", "bad": "[red]✗[/]"}
    table = Table("", "", "", box=None, pad_edge=False, show_header=False)
    findings = diagnose()
    for finding in findings:
        table.add_row(marks[finding.status], escape(finding.subject), escape(finding.found))
        if finding.advice:
            table.add_row("", "", f"[dim]→ {escape(finding.advice)}[/]")
    _console().print(table)
    if any(finding.status == "bad" for finding in findings):
        raise SystemExit(1)


def bench(
    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="[METHOD …]", help="default: the zoo")] = (),
    /,
    shapes: Annotated[tuple[str, ...], arg(help="each B,T,H,K,V; the default depends on the device")] = (),
    device: Annotated[str | None, arg(help="cuda or cpu; default: cuda where there is one")] = None,
    against: Annotated[
        tuple[str, ...] | None,
        arg(help="time these too: compiled, loop, fla, flashqla, helion, sdpa; default: the loop on a CPU"),
    ] = None,
    decode: Annotated[bool, arg(help="time single tokens through step() instead")] = False,
    first_calls: Annotated[int, arg(help="time first calls with empty caches, so many at a time")] = 0,
    patience: Annotated[float, arg(help="seconds for a first call")] = 600.0,
    caches: Annotated[Path | None, arg(help="keep the caches of first calls in this folder, to go on from")] = None,
    read: Annotated[Path | None, arg(help="show what an earlier run wrote to --out, measure nothing")] = None,
    out: Annotated[Path | None, arg(help="also write JSON")] = None,
    markdown: Annotated[bool, arg(help="print tables as Markdown")] = False,
    page: Annotated[Path | None, arg(help="also write a page with pictures")] = None,
) -> None:
    """Time the operators beside other code, with their errors and the floor of moving inputs and outputs once."""
    from lsmc.runtime.bench import run

    run(methods, shapes=shapes, device=device, against=against, decoding=decode, first_calls=first_calls, patience=patience,
        caches=caches, read=read, out=out, markdown=markdown, page=page)  # fmt: skip


def tune(
    methods: Annotated[Positional[tuple[str, ...]], arg(metavar="[METHOD …]", help="default: the zoo")] = (),
    /,
    shapes: Annotated[tuple[str, ...], arg(help="each B,T,H,K,V")] = (),
    dtype: Annotated[str, arg(help="of q, k and v: bfloat16, float16 or float32")] = "bfloat16",
    gates: Annotated[str | None, arg(help="of the other inputs of a token; default: the same")] = None,
    scale: Annotated[float, arg(help="the operator's `scale`, which stands in the generated code")] = 1.0,
    state: Annotated[bool, arg(help="for calls that start from a memory and whose final one is used")] = False,
    packed: Annotated[bool, arg(help="for calls with `cu_seqlens`: the B sequences packed into one")] = False,
    limit: Annotated[float | None, arg(help="seconds, after which the best so far is taken")] = None,
    out: Annotated[Path | None, arg(help="also write what was found, all in one JSON file")] = None,
    dry_run: Annotated[bool, arg(help="list the candidates and what they take of an sm_90; needs no GPU")] = False,
) -> None:
    """Find the fastest plans of a method's kernels among those that give the right numbers, and keep them in the cache."""
    from lsmc.runtime.tuning import run

    run(methods, shapes=shapes, dtype=dtype, gates=gates, scale=scale, state=state, packed=packed, limit=limit, out=out,
        dry_run=dry_run)  # fmt: skip


def train() -> None:
    """Train a hybrid model on text: `lsmc train [CONFIG] --help` lists every setting."""


def generate() -> None:
    """Continue a text with a trained model, its memory of constant size: `lsmc generate --help`."""


def _train(arguments: Sequence[str]) -> None:
    """CONFIG is a model size, or a JSON file such as the `config.json` of a run; settings after it override it."""
    from lsmc.runtime.train import TrainConfig
    from lsmc.runtime.train import train as run

    default = TrainConfig()
    if arguments and not arguments[0].startswith("-"):
        default, arguments = _train_config(arguments[0]), arguments[1:]
    result = run(_settings(TrainConfig, "lsmc train", "Train a hybrid model on text.", arguments, default))
    if result.interrupted:
        raise SystemExit(130)


def _train_config(text: str) -> Any:
    import json

    from lsmc.runtime.errors import LsmConfigError
    from lsmc.runtime.train import TrainConfig

    if not text.endswith(".json"):
        return TrainConfig(model=text)
    try:
        return _from_json(TrainConfig, json.loads(Path(text).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise LsmConfigError(f"{text} is not a training configuration: {error}") from error


def _from_json(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from plain JSON values, the inverse of `lsmc.runtime.train.to_json`."""
    hints = get_type_hints(kind)
    made = {}
    for name, value in values.items():
        hint = hints.get(name)
        if isinstance(value, dict):
            value = _from_json(hint, value)
        elif hint is Path:
            value = Path(value)
        made[name] = value
    return kind(**made)


def _generate(arguments: Sequence[str]) -> None:
    from lsmc.runtime.generate import GenerateConfig
    from lsmc.runtime.generate import generate as run

    default = GenerateConfig()
    if arguments and not arguments[0].startswith("-"):
        default, arguments = GenerateConfig(run=Path(arguments[0])), arguments[1:]
    run(_settings(GenerateConfig, "lsmc generate", "Continue a text.", arguments, default))


def _settings(kind: Any, prog: str, description: str, arguments: Sequence[str], default: Any) -> Any:
    return tyro.cli(kind, prog=prog, description=description, args=list(arguments), default=default)


# Commands whose settings are dataclasses of the runtime: read only when they are called.
LATE: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "generate": _generate}

COMMANDS: dict[str, Callable[..., Any]] = {
    "list": list_,
    "explain": explain,
    "scaling": scaling,
    "check": check,
    "train": train,
    "generate": generate,
    "bench": bench,
    "tune": tune,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of ``lsmc``. Exits 1 with the message alone on a user's mistake, 130 on Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        if arguments[0] in LATE:
            LATE[arguments[0]](arguments[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(
                COMMANDS, prog="lsmc", description="A compiler for linear sequence models.", args=arguments
            )
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has had enough
        raise SystemExit(0) from None
    except Exception as error:
        if not _is_users_mistake(error):
            raise
        # Errors lay out their carets for this prefix, which Python prints too.
        sys.stderr.write(f"lsmc.{type(error).__name__}: {error}\n")
        raise SystemExit(1) from None


def _is_users_mistake(error: Exception) -> bool:
    from lsmc.errors import LsmError

    return isinstance(error, LsmError)


def _show(table: Table) -> None:
    """A table as wide as it is."""
    console = _console()
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=1000)).maximum)
    console.print(table)


def _console() -> Console:
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False)


def _resolve(method: str) -> Any:
    from lsmc.resolve import resolve

    return resolve(method)


def _explanation(method: str, shape: str | None) -> Any:
    import lsmc
    from lsmc.runtime.bench import parse_shape
    from lsmc.schedules import Shape

    if shape is None:
        return lsmc.explain(_resolve(method))
    batch, tokens, heads, key, value = parse_shape(shape)
    return lsmc.explain(_resolve(method), shape=Shape(batch * heads, tokens, key, value))


if __name__ == "__main__":
    main()
