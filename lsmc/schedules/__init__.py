"""The schedules a program may be cut by; a new one is a new file and its line here."""

from lsmc.schedules.base import Choice, Cut, Kernel, Schedule, choose
from lsmc.schedules.cost import Cost, Shape
from lsmc.schedules.fused import fused
from lsmc.schedules.half_fused import half_fused
from lsmc.schedules.segments import fused_segments, segments
from lsmc.schedules.three_pass import three_pass
from lsmc.schedules.two_pass import two_pass
from lsmc.schedules.walk import walk

CUTS: dict[str, Cut] = {"fused": fused, "two_pass": two_pass, "half_fused": half_fused,
                        "three_pass": three_pass, "segments": segments, "fused_segments": fused_segments, "walk": walk}

__all__ = ["CUTS", "Choice", "Cost", "Cut", "Kernel", "Schedule", "Shape", "choose", "fused", "fused_segments", "half_fused",
           "segments", "three_pass", "two_pass", "walk"]
