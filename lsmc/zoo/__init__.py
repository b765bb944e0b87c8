"""The declared methods, one file each: ``lsmc.zoo.gla`` is a declaration, ``lsmc.zoo.names()`` lists them.

To add a method, add its file and its line in `METHODS`.
"""

from __future__ import annotations

from lsmc.lsm import LSM
from lsmc.zoo.bla import bla
from lsmc.zoo.deltanet import deltanet
from lsmc.zoo.gated_deltanet import gated_deltanet
from lsmc.zoo.gla import gla
from lsmc.zoo.kda import kda
from lsmc.zoo.mamba2 import mamba2
from lsmc.zoo.retnet import retnet
from lsmc.zoo.rwkv6 import rwkv6

METHODS: tuple[LSM, ...] = (bla, retnet, mamba2, gla, deltanet, gated_deltanet, kda, rwkv6)


def names() -> tuple[str, ...]:
    """The names of the declared methods, in the order of the list."""
    return tuple(method.name for method in METHODS)


__all__ = ["METHODS", "bla", "deltanet", "gated_deltanet", "gla", "kda", "mamba2", "names", "retnet", "rwkv6"]
