"""Generated kernels live in real source files: Triton reads their text, and tracebacks show it.

Files are named by the hash of their content, written atomically into a directory that only its owner can enter, and
compared with the expected text before they are imported.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import os
import re
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType


def digest(text: str) -> str:
    """The content hash by which a generated source is named."""
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def reached(library: str, source: str) -> str:
    """Of a library's source what another source gets to by name: its functions, those that they name, without what they say of
    themselves; and all that is no function."""
    rest, functions = _parts(library)
    todo, found = {*re.findall(r"\w+", source)}, set[str]()
    while todo := todo & functions.keys() - found:
        found |= todo
        todo = {name for one in todo for name in functions[one][1]}
    return "\n".join([rest, *(functions[name][0] for name in sorted(found))])


@functools.cache
def _parts(library: str) -> tuple[str, dict[str, tuple[str, frozenset[str]]]]:
    """What is no function, and the text of each function with the names in it."""
    rest, functions = list[str](), dict[str, tuple[str, frozenset[str]]]()
    for part in ast.parse(library).body:
        if not isinstance(part, ast.FunctionDef):
            rest += [] if isinstance(part, ast.Expr) else [ast.unparse(part)]
            continue
        if ast.get_docstring(part) is not None:
            part.body = part.body[1:] or [ast.Pass()]
        names = frozenset(n.id for n in ast.walk(part) if isinstance(n, ast.Name))
        functions[part.name] = ast.unparse(part), names
    return "\n".join(rest), functions


def private_dir(part: str) -> Path | None:
    """The folder `part` of `$LSMC_CACHE`, else of `~/.cache/lsmc`, with mode 0700; None where it cannot be ours."""
    home = os.environ.get("LSMC_CACHE") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lsmc")
    path = Path(home) / part
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = path.lstat()
        if stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid():
            if info.st_mode & 0o077:
                path.chmod(0o700)
            if os.access(path, os.W_OK | os.X_OK):
                return path
    except OSError:
        pass
    return None


def cache_dir() -> Path:
    """Where generated sources go: the private folder `kernels`, else a private temporary directory."""
    return private_dir("kernels") or Path(tempfile.mkdtemp(prefix="lsmc-kernels-"))


def load(source: str) -> ModuleType:
    """The module of a generated source; the same text gives the same module."""
    name = f"lsmc_kernels_{digest(source)}"
    if name in sys.modules:
        return sys.modules[name]
    path = cache_dir() / f"{name}.py"
    if path.is_symlink() or not path.exists() or path.read_text() != source:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.")
        with os.fdopen(handle, "w") as file:
            file.write(source)
        os.replace(temporary, path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
