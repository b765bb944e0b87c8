"""A declaration from what a person types: its name in the zoo, or ``FILE.py:NAME``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from lsmc.errors import LsmError, LsmNameError, LsmUnknownSymbolError, Where


class LsmFileError(LsmError):
    """A user's file that does not run: its line, and what Python says."""

    __module__ = "lsmc"


def resolve(text: str) -> Any:
    """``"FILE.py:NAME"`` imports the file and takes NAME from it; anything else is looked up in the zoo.

    Raises `LsmNameError` when there is no such file or name, or when the name is not a declaration. Mistakes of the
    language are passed on as they are; anything else that goes wrong while the file runs becomes an `LsmFileError`
    at the line of the file, a name that it does not define an `LsmUnknownSymbolError`.
    """
    from lsmc.lsm import LSM

    if ".py" in text or ":" in text:
        path, _, name = text.rpartition(":")
        if text.endswith(".py") or (path.endswith(".py") and not name):
            raise LsmNameError(f"{text}: which declaration of the file?", help="write FILE.py:NAME")
        if not path.endswith(".py"):
            raise LsmNameError(f"{path or text} is not a Python file", help="write FILE.py:NAME")
        module = _import(Path(path))
        found = getattr(module, name, None)
        if not isinstance(found, LSM):
            there = sorted(key for key, value in vars(module).items() if isinstance(value, LSM))
            what = (
                f"{name} is not a declaration (an LSM)" if hasattr(module, name) else f"defines no {name!r}"
            )
            raise LsmNameError(f"{path}: {what}", help=f"it declares {', '.join(there) or 'none'}")
        return found
    zoo = importlib.import_module("lsmc.zoo")
    if text not in zoo.names():
        raise LsmNameError(
            f"no method is called {text!r}",
            help=f"the zoo has {', '.join(zoo.names())}; a method of your own is FILE.py:NAME",
        )
    return getattr(zoo, text)


def _import(path: Path) -> ModuleType:
    if not path.is_file():
        raise LsmNameError(f"there is no file {path}", help=f"FILE.py:NAME is looked up from {Path.cwd()}")
    path = path.resolve()
    module_name = f"_lsmc_user_{path.stem}_{abs(hash(path)):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before it runs: dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except LsmError:
        del sys.modules[module_name]
        raise
    except Exception as error:
        del sys.modules[module_name]
        raise _explained(path, error) from error
    except BaseException:
        del sys.modules[module_name]
        raise
    return module


def _explained(path: Path, error: Exception) -> LsmError:
    """What went wrong in the user's file, at the innermost of its lines."""
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename or path).name}:{error.lineno}: " if error.lineno else ""
        return LsmFileError(f"{place}{(error.text or '').strip()}\n    {type(error).__name__}: {error.msg}")
    where, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            where = Where(trace.tb_frame.f_code, trace.tb_lasti, trace.tb_lineno)
        trace = trace.tb_next
    if isinstance(error, NameError) and error.name:
        way = f'declare it, {error.name} = scalar("{error.name}") or vector("{error.name}"), or import it'
        return LsmUnknownSymbolError(said, where=where, help=way)
    return LsmFileError(said, where=where)
