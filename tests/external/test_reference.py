"""The reference against code that this project did not write: fla-core's plain loops and transformers' torch functions.

They convert to float32 themselves; here these conversions give float64, so that what agrees, agrees to rounding: output, final
state and the gradients that autograd finds through either. Without the packages the tests are skipped, and say so.

    python -m tests.external.test_reference        prints the table of docs/methods.md
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lsmc import LSM, Constant, M, exp, k, outer, q, reference, v, vector, zoo
from lsmc.cases import Case, sample, tensors
from lsmc.resolve import resolve

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TOLERANCE = 1e-11
"""Largest RMS error over the RMS of what the other code gives, float64."""

Inputs = Mapping[str, Tensor]
Found = tuple[Tensor | None, Sequence[Tensor]]
"""o (B, T, HV, V) and the final memories; none where the other code does not give them, or gives others."""


@dataclass(frozen=True)
class Peer:
    """One function of another package that computes a method. ``call(function, inputs, memories)`` gives its o and memories."""

    method: str
    package: str
    function: str
    call: Callable[[Any, Inputs, Sequence[Tensor]], Found]
    scaled: bool = False  # it multiplies q by 1/√K itself
    start: bool = True  # it can start from a memory
    groups: int = 1
    heads: int = 2
    inputs: Callable[[Inputs], Inputs] = dict
    agrees: bool = True


wkv = LSM(
    "wkv",
    decay=Constant("log_a"),
    update=outer(exp(k), v),
    readout=(q @ (M.previous + outer(exp(vector("u", per="head") + k), v)))
    / (q @ (M.previous.normalizer + exp(vector("u", per="head") + k))),
)
"""RWKV-4 with a head for every channel, K = V = 1 and q = 1: it is declared here for the sake of the comparison."""


def swapped(*xs: Tensor) -> list[Tensor]:
    """(B, T, H, …) as (B, H, T, …), and back."""
    return [x.transpose(1, 2) for x in xs]


def wide(x: Inputs, name: str) -> Tensor:
    """q or k of every value head."""
    return x[name].repeat_interleave(x["v"].shape[2] // x[name].shape[2], 2)


def usual(*names: str, **renamed: str) -> Callable[[Any, Inputs, Sequence[Tensor]], Found]:
    """A function of (B, T, H, …) by position that takes `initial_state` and `output_final_state`."""

    def call(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
        more = {"scale": 1.0} if "scale" in inspect.signature(f).parameters else {}
        o, end = f(*(x[n] for n in names), **{a: x[b] for a, b in renamed.items()}, **more, initial_state=start[0],
                   output_final_state=True)
        return o, [end]

    return call


def heads_first(*names: str, **options: Any) -> Callable[[Any, Inputs, Sequence[Tensor]], Found]:
    def call(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
        o, end = f(*swapped(*(x[n] for n in names)), initial_state=start[0], output_final_state=True, **options)
        return o.transpose(1, 2), [end]

    return call


def vectors(f: Any, x: Inputs, start: Sequence[Tensor], k: Tensor, g: Tensor) -> Found:
    o, end = f(x["q"], k, x["v"], g, initial_state=start[0], output_final_state=True)
    return o, [end]


def scalars(f: Any, x: Inputs, start: Sequence[Tensor], v: Tensor, g: Tensor) -> Found:
    o, end = f(x["q"], x["k"], v, g, scale=1.0, initial_state=start[0], output_final_state=True)
    return o, [end]


def entries(log: Callable[[Inputs], Tensor], written: Callable[[Inputs], Tensor], query: str = "q", skip: bool = True) -> Any:
    """Every entry of the memory as a channel of an elementwise recurrence h ← e^g h + x."""

    def call(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
        new = written(x)
        h, end = f(new.flatten(2), log(x).expand_as(new).flatten(2), start[0].flatten(1), True)
        o = torch.einsum("bthk,bthkv->bthv", x[query].expand(new.shape[:-1]), h.view(new.shape))
        return o + x["D"] * x["v"] if skip else o, [end.view(start[0].shape)]

    return call


def skipped(f: Any, x: Inputs, name: str = "v") -> Found:
    D = x["D"] if x["D"].dim() == 2 else x["D"][:, None]
    return f[0] + D * x[name], f[1]


def momentum(f: Any, x: Inputs, start: Sequence[Tensor], log_mu: Tensor) -> Found:
    """S ← α S − B, B ← μ B + θ kᵀ(k S − v): the accumulator with the other sign."""
    o, end = f(x["q"], x["k"], x["v"], torch.log1p(-x["alpha"]), log_mu, x["k"], torch.ones_like(x["theta"]), x["theta"],
               scale=1.0, initial_S=start[0], initial_M=-start[1], output_final_state=True)
    return o, [end[0], -end[1]]


def selective_scan(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
    """One head: channels first, (B, V, T); what does not vary over tokens is repeated."""
    of, B, T = {"k": "k" if "k" in x else "b", "q": "q" if "q" in x else "c"}, *x["v"].shape[:2]
    dt, into, out = (x[n][:, :, 0] if x[n].dim() == 4 else x[n].expand(B, T, -1) for n in ("dt", of["k"], of["q"]))
    o, end = f(x["v"][:, :, 0].mT, dt.mT, x["A"][0].mT, into.mT, out.mT, x["D"][0], return_last_state=True)
    return o.mT[:, :, None], [end.mT[:, None]]


def chunk_scan(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
    o, end = f(x["v"], x["dt"], x["A"], x["k"], x["q"], 16, D=x["D"], initial_states=start[0].mT, return_final_states=True)
    return o, [end.mT]


def two_steps(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
    """Both steps of a token one behind the other, as tokens of their own."""
    k, v, beta = (torch.stack([x[n], x[f"{n}2"]], 2).flatten(1, 2) for n in ("k", "v", "beta"))
    o, end = f(x["q"], k, v, x["g"], beta, 1.0, initial_state=start[0], output_final_state=True, num_householder=2)
    return o, [end]


def corrected(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
    b, d = x["b"][:, None], x["d"][:, None]
    o, end = f(x["q"] - d * x["k"], x["k"], x["v"], b * x["k"], g=x["g"], beta=x["beta"], scale=1.0, initial_state=start[0],
               output_final_state=True)
    return o, [end]


def stabilised(x: Inputs) -> Inputs:
    """g, i, m from raw gates: here g and i stand for those."""
    m, g = [torch.zeros_like(x["m"][:, 0])], []
    for f, i in zip(torch.nn.functional.logsigmoid(x["g"]).unbind(1), x["i"].unbind(1)):
        m.append(torch.maximum(f + m[-1], i))
        g.append(f + m[-2] - m[-1])
    top = torch.stack(m[1:], 1)
    return {**x, "g": torch.stack(g, 1), "i": x["i"] - top, "m": top}


def raw_gates(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
    o, (C, n, _) = f(*swapped(*(x[name] for name in ("q", "k", "v", "i", "g"))), return_last_states=True, eps=0.0,
                     dtype_state=torch.float64)
    return o.transpose(1, 2), [C, n]


def channels(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
    o, (num, den, top) = f((-x["log_a"]).log(), x["u"][:, 0], x["k"][..., 0], x["v"][..., 0], return_state=True)
    return o[..., None], [(num * top.exp())[..., None, None], (den * top.exp())[..., None]]


def one_rate(block: int) -> Callable[[Inputs], Inputs]:
    """The learning rate of a block's last token for all of its tokens, as the other code updates its memory."""
    return lambda x: {**x, "eta": x["eta"][:, block - 1 :: block].repeat_interleave(block, 1)}


def mini_batches(block: int) -> Callable[[Any, Inputs, Sequence[Tensor]], Found]:
    """Its o has q M + m where ours has q: the memories are compared."""

    def call(f: Any, x: Inputs, start: Sequence[Tensor]) -> Found:
        eta = x["eta"][..., None].transpose(1, 2)
        _, h, bias = f(*swapped(x["q"], x["k"], x["v"]), x["w"], x["b"], eta, 1.0, 1e-6, block, None, None, True)
        return None, [h, bias[:, :, 0]]

    return call


def one_query(x: Inputs) -> Inputs:
    return {**x, "q": torch.ones_like(x["q"])}


LOOP = {name: f"ops/{name}/naive.py" for name in ("comba", "delta_rule", "gated_delta_product", "gated_delta_rule", "gdn2", "gla", "hgrn",
                                                  "kda", "linear_attn", "momentum_delta_rule", "rebased", "retention", "simple_gla", "ttt")}  # fmt: skip
ELEMENTWISE = f"{LOOP['hgrn']}:naive_recurrent_hgrn"
OVER_K = f"{LOOP['gla']}:naive_recurrent_gla"
ONE_NUMBER = f"{LOOP['simple_gla']}:naive_recurrent_simple_gla"

PEERS = (
    Peer("bla", "fla", f"{LOOP['linear_attn']}:naive_recurrent_linear_attn", usual("q", "k", "v")),
    Peer("retnet", "fla", f"{LOOP['retention']}:naive_retention", lambda f, x, s: (f(*swapped(x["q"], x["k"], x["v"])).transpose(1, 2), []),
         scaled=True, start=False),
    Peer("lightning", "fla", ONE_NUMBER, lambda f, x, s: scalars(f, x, s, x["v"], x["log_a"].expand(x["v"].shape[:3]))),
    Peer("gla", "fla", OVER_K, lambda f, x, s: vectors(f, x, s, x["k"], x["g"]), scaled=True),
    Peer("gateloop_real", "fla", OVER_K, lambda f, x, s: vectors(f, x, s, x["k"], x["g"]), scaled=True),
    Peer("hgrn2", "fla", OVER_K, lambda f, x, s: vectors(f, x, s, -torch.expm1(x["g"]), x["g"]), scaled=True),
    Peer("gfw", "fla", ELEMENTWISE, entries(lambda x: x["gk"][..., None] + x["gv"][..., None, :],
                                            lambda x: x["k"][..., None] * x["v"][..., None, :], skip=False)),
    Peer("gfw_full", "fla", ELEMENTWISE, entries(lambda x: x["A"].log(), lambda x: x["k"][..., None] * x["v"][..., None, :], skip=False)),
    Peer("rebased", "fla", f"{LOOP['rebased']}:naive_parallel_rebased", lambda f, x, s: (f(
        *swapped(*(x["gamma"] * x[n] + x["beta"] for n in "qk"), x["v"]), 1.0).transpose(1, 2), []), start=False),
    Peer("ttt_ln", "fla", f"{LOOP['ttt']}:ttt_linear", mini_batches(16), start=False, inputs=one_rate(16)),
    Peer("ttt_ln_sequential", "fla", f"{LOOP['ttt']}:ttt_linear", mini_batches(1), start=False),
    Peer("deltanet", "fla", f"{LOOP['delta_rule']}:delta_rule_recurrence", heads_first("q", "k", "v", "beta"), scaled=True),
    Peer("ttt", "fla", f"{LOOP['delta_rule']}:delta_rule_recurrence", heads_first("q", "k", "v", "eta"), scaled=True),
    Peer("gated_deltanet", "fla", f"{LOOP['gated_delta_rule']}:naive_recurrent_gated_delta_rule", usual("q", "k", "v", "beta", "g")),
    Peer("gated_deltanet", "fla", f"{LOOP['gated_delta_rule']}:naive_chunk_gated_delta_rule", usual("q", "k", "v", "g", "beta")),
    Peer("gated_deltanet", "transformers", "qwen3_next:torch_recurrent_gated_delta_rule", usual("q", "k", "v", "g", "beta"), scaled=True, groups=2),
    Peer("gated_deltanet", "transformers", "qwen3_next:torch_chunk_gated_delta_rule", usual("q", "k", "v", "g", "beta"), scaled=True, groups=2),
    Peer("kda", "fla", f"{LOOP['kda']}:naive_recurrent_kda", usual("q", "k", "v", "g", "beta"), groups=2),
    Peer("kda", "fla", f"{LOOP['kda']}:naive_chunk_kda", usual("q", "k", "v", "g", "beta"), groups=2),
    Peer("kda", "transformers", "kimi_linear:recurrent_kimi_delta_attention", usual("q", "k", "v", "g", "beta"), scaled=True),
    Peer("kda", "transformers", "kimi_linear:chunk_kimi_delta_attention", usual("q", "k", "v", "g", "beta"), scaled=True),
    Peer("titans_plain", "fla", f"{LOOP['momentum_delta_rule']}:recurrent_momentum_delta_rule_ref",
         lambda f, x, s: (lambda found: (found[0], found[1][:1]))(
             momentum(f, x, [*s, torch.zeros_like(s[0])], torch.full_like(x["alpha"], -torch.inf)))),
    Peer("titans", "fla", f"{LOOP['momentum_delta_rule']}:recurrent_momentum_delta_rule_ref", lambda f, x, s: momentum(f, x, s, x["eta"].log())),
    Peer("s4", "fla", ELEMENTWISE, entries(lambda x: x["dt"][:, None] * x["A"], lambda x: x["b"][..., None] * (x["dt"] * x["v"])[..., None, :], "c")),
    Peer("s4", "transformers", "mamba:mamba_selective_scan", selective_scan, start=False, heads=1),
    Peer("mamba", "fla", ELEMENTWISE, entries(lambda x: x["dt"][..., None, :] * x["A"], lambda x: x["k"][..., None] * (x["dt"] * x["v"])[..., None, :])),
    Peer("mamba", "transformers", "mamba:mamba_selective_scan", selective_scan, start=False, heads=1),
    Peer("mamba2", "fla", ONE_NUMBER, lambda f, x, s: skipped(scalars(f, x, s, x["dt"][..., None] * x["v"], x["A"] * x["dt"]), x)),
    Peer("mamba2", "transformers", "mamba2:mamba2_chunk_scan", chunk_scan, groups=2),
    Peer("rwkv6", "fla", "ops/rwkv6/recurrent_naive.py:naive_recurrent_rwkv6",
         lambda f, x, s: heads_first("q", "k", "v", "g", scale=1.0)(lambda *a, **o: f(*a, x["u"], **o), x, s)),
    Peer("rwkv7", "fla", "ops/generalized_delta_rule/dplr/naive.py:dplr_recurrence", heads_first("q", "k", "v", "a", "b", "g"), scaled=True),
    Peer("wkv", "transformers", "rwkv:rwkv_linear_attention_cpu", channels, start=False, inputs=one_query),
    Peer("comba", "fla", f"{LOOP['comba']}:naive_chunk_comba", corrected),
    Peer("comba", "fla", f"{LOOP['comba']}:naive_recurrent_comba", corrected, agrees=False),
    Peer("gated_deltaproduct", "fla", f"{LOOP['gated_delta_product']}:naive_recurrent_gated_delta_product", two_steps),
    Peer("gated_deltanet2", "fla", f"{LOOP['gdn2']}:naive_recurrent_gdn2", usual("q", "k", "v", "g", "b", "w")),
    Peer("gated_deltanet2", "fla", f"{LOOP['gdn2']}:naive_chunk_gdn2", usual("q", "k", "v", "g", "b", "w")),
    Peer("longhorn", "fla", ELEMENTWISE, entries(
        lambda x: torch.log1p(-x["k"].square()[..., None] * step(x)[..., None, :]), lambda x: x["k"][..., None] * (step(x) * x["v"])[..., None, :])),
    Peer("mlstm", "transformers", "xlstm:mlstm_recurrent_sequence_native", raw_gates, scaled=True, start=False, inputs=stabilised),
    Peer("rodimus", "fla", OVER_K, lambda f, x, s: skipped(vectors(
        f, x, s, x["log_gamma"].mul(x["tau"]).exp() * x["k"], -x["tau"] * x["log_gamma"].exp()), x, "x"), scaled=True),
)  # fmt: skip


def step(x: Inputs) -> Tensor:
    return x["beta"] / (1 + x["beta"] * x["k"].square().sum(-1, keepdim=True))


@contextmanager
def float64() -> Iterator[None]:
    """Conversions to float32 give float64."""
    kept = torch.float32, torch.float, torch.Tensor.float
    names: Any = torch
    try:
        names.float32 = names.float = torch.float64
        names.Tensor.float = torch.Tensor.double
        yield
    finally:
        names.float32, names.float, names.Tensor.float = kept


def load(peer: Peer) -> Any:
    """The other code's function; None where its package is absent. Of fla only the file is run, which needs torch alone."""
    file, _, name = peer.function.partition(":")
    found = importlib.util.find_spec(peer.package)
    if found is None or not found.submodule_search_locations:
        return None
    if peer.package == "transformers":
        return inspect.unwrap(getattr(importlib.import_module(f"transformers.models.{file}.modeling_{file}"), name))
    spec = importlib.util.spec_from_file_location("_peer", Path(found.submodule_search_locations[0]) / file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def declaration(name: str) -> LSM:
    if name == "wkv":
        return wkv
    made: LSM = getattr(zoo, name) if name in zoo.names() else resolve(f"{EXAMPLES / name}.py:{name}")
    return made


def difference(peer: Peer, function: Any) -> tuple[float, float]:
    """The largest error of output and final memories, and of gradients, each RMS over the RMS of what the other code gives."""
    method, one = declaration(peer.method), peer.method == "wkv"
    case = Case(batch=2, time=64, heads=peer.heads, groups=peer.groups, key_dim=1 if one else 5, value_dim=1 if one else 4,
                initial_state=peer.start, defaults=True)
    drawn = sample(method, case)
    leaves = drawn.leaves()
    scale = case.key_dim**-0.5 if peer.scaled else 1.0
    o, end = reference(method)(**peer.inputs(drawn.inputs), initial_state=drawn.state, return_final_state=True, scale=scale)
    with float64():
        start = tensors(drawn.state) or [x.detach() * 0 for x in tensors(end)]
        wanted = peer.call(function, {n: x.clone() for n, x in drawn.inputs.items()}, [x.clone() for x in start])
    pairs = [(x, y) for x, y in zip([o, *tensors(end)], [wanted[0], *wanted[1]]) if y is not None]
    weights = [torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) for x, _ in pairs]
    ours, theirs = ([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, torch.autograd.grad(
        outputs, leaves, weights, allow_unused=True))] for outputs in zip(*pairs))
    error = lambda x, y: float((x - y).square().mean().sqrt() / y.square().mean().sqrt().clamp(min=1e-3))  # noqa: E731
    assert all(x.dtype == y.dtype == torch.float64 and x.shape == y.shape for x, y in pairs)
    return max(error(x.detach(), y.detach()) for x, y in pairs), max(error(x, y) for x, y in zip(ours, theirs))


@pytest.mark.parametrize("peer", PEERS, ids=lambda p: f"{p.method}-{p.package}-{p.function.partition(':')[2]}")
def test_the_reference_computes_what_other_code_computes(peer: Peer) -> None:
    function = load(peer)
    if function is None:
        pytest.skip(f"{peer.package} is not installed")
    errors = difference(peer, function)
    if peer.agrees:
        assert max(errors) < TOLERANCE, errors
    else:
        assert min(errors) > 1e-3, f"they agree now: {errors}"


def main() -> None:
    """The table of docs/methods.md."""
    print("| method | other code | output and memories | gradients | |\n|---|---|--:|--:|---|")
    for peer in PEERS:
        function = load(peer)
        if function is None:
            print(f"| {peer.method} | {peer.package} | not installed | | |")
            continue
        values, gradients = difference(peer, function)
        version = importlib.metadata.version({"fla": "fla-core"}.get(peer.package, peer.package))
        name = peer.function.partition(":")[2]
        says = "agrees" if max(values, gradients) < TOLERANCE else "**disagrees**"
        print(f"| {peer.method} | {peer.package} {version} `{name}` | {values:.1e} | {gradients:.1e} | {says} |")


if __name__ == "__main__":
    main()
