"""Times of the operators beside those of other code, with their errors and their floors: ``lsmc bench``.

    contenders.py   the ways to run a method, ours and other people's
    measure.py      one method at one shape, in this process
    first.py        one first call, in a fresh process
    command.py      many methods, a process each; JSON
    show.py, page.py   tables, and a page with pictures
"""

from lsmc.runtime.bench.command import main, run
from lsmc.runtime.bench.measure import parse_shape

__all__ = ["main", "parse_shape", "run"]
