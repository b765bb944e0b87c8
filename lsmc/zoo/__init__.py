"""The declared methods, one file each: ``lsmc.zoo.gla`` is a declaration, ``lsmc.zoo.names()`` lists them.

To add a method, add its file and its line in `METHODS`.
"""

from __future__ import annotations

from lsmc.lsm import LSM
from lsmc.zoo.bla import bla
from lsmc.zoo.deltanet import deltanet
from lsmc.zoo.gated_deltanet import gated_deltanet
from lsmc.zoo.gateloop import gateloop
from lsmc.zoo.gateloop_real import gateloop_real
from lsmc.zoo.gfw import gfw
from lsmc.zoo.gfw_full import gfw_full
from lsmc.zoo.gla import gla
from lsmc.zoo.hgrn2 import hgrn2
from lsmc.zoo.kda import kda
from lsmc.zoo.lightning import lightning
from lsmc.zoo.mamba import mamba
from lsmc.zoo.mamba2 import mamba2
from lsmc.zoo.rebased import rebased
from lsmc.zoo.retnet import retnet
from lsmc.zoo.rwkv6 import rwkv6
from lsmc.zoo.rwkv7 import rwkv7
from lsmc.zoo.s4 import s4
from lsmc.zoo.s4_complex import s4_complex
from lsmc.zoo.titans import titans
from lsmc.zoo.titans_plain import titans_plain
from lsmc.zoo.ttt import ttt
from lsmc.zoo.ttt_ln import ttt_ln
from lsmc.zoo.ttt_ln_sequential import ttt_ln_sequential

METHODS: tuple[LSM, ...] = (
    bla, lightning, retnet, mamba2, gla, gfw, gfw_full, gateloop_real, gateloop, deltanet, gated_deltanet, kda, ttt, ttt_ln,
    ttt_ln_sequential, titans_plain, titans, rebased, s4, s4_complex, mamba, hgrn2, rwkv6, rwkv7,
)  # fmt: skip


def names() -> tuple[str, ...]:
    """The names of the declared methods, in the order of the list."""
    return tuple(method.name for method in METHODS)


__all__ = [
    "METHODS", "bla", "deltanet", "gated_deltanet", "gateloop", "gateloop_real", "gfw", "gfw_full", "gla", "hgrn2", "kda",
    "lightning", "mamba", "mamba2", "names", "rebased", "retnet", "rwkv6", "rwkv7", "s4", "s4_complex", "titans",
    "titans_plain", "ttt", "ttt_ln", "ttt_ln_sequential",
]  # fmt: skip
