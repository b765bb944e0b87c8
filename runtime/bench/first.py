"""The first call of one contender, in a fresh process: ``python -m lsmc.runtime.bench.first METHOD CONTENDER DEVICE SHAPE …``.

Prints a line of JSON: seconds until the first gradient at each shape, in order, or why the contender is absent.
"""

from __future__ import annotations

import json
import sys

import torch

from lsmc.resolve import resolve
from lsmc.runtime.bench.contenders import Absent
from lsmc.runtime.bench.measure import Subject, parse_shape


def main(method: str, contender: str, device: str, *shapes: str) -> None:
    declaration, seconds = resolve(method), []
    try:
        for shape in shapes:
            seconds.append(Subject(declaration, parse_shape(shape), device).first_call(contender)[2])
            if device.startswith("cuda"):
                torch.cuda.empty_cache()  # others may be at work beside this
    except Absent as reason:
        print(json.dumps({"absent": str(reason)}))
    else:
        print(json.dumps({"seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
