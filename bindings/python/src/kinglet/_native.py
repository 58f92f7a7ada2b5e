"""The shared library behind the package: found, loaded, its errors turned into exceptions.

The C header is the one source of declarations. In a wheel, header and library lie in this folder; in a checkout the header
is taken from ``ffi/include``. ``KINGLET_LIBRARY`` names another library.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import re
from pathlib import Path
from typing import Any, Callable, TypeVar

from cffi import FFI

_HERE = Path(__file__).parent
_HEADERS = (_HERE / "kinglet.h", _HERE.parents[3] / "ffi" / "include" / "kinglet.h")


def _declarations() -> str:
    """The header without comments and directives, which cffi does not read."""
    for path in _HEADERS:
        if path.is_file():
            text = re.sub(r"/\*.*?\*/", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
            # What only a C++ compiler reads, then all other directives.
            text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
            return re.sub(r"^\s*#.*$", "", text, flags=re.MULTILINE)
    raise ImportError(f"kinglet.h is in none of {', '.join(map(str, _HEADERS))}; install the package again")


def _library() -> str:
    """The path, or the name, of the shared library."""
    given = os.environ.get("KINGLET_LIBRARY")
    if given:
        return given
    for name in ("libkinglet.so.1", "libkinglet.dylib", "kinglet.dll"):
        if (_HERE / name).is_file():
            return str(_HERE / name)
    return ctypes.util.find_library("kinglet") or "libkinglet.so.1"


# cffi knows the types of what C returns only when it runs.
ffi: Any = FFI()
ffi.cdef(_declarations())
try:
    lib: Any = ffi.dlopen(_library())
except OSError as error:
    raise ImportError(f"{error}; set KINGLET_LIBRARY to the path of libkinglet.so") from error


class Error(Exception):
    """What the library says went wrong. ``code`` is a ``KINGLET_ERR_*`` number."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class ArgumentError(Error, ValueError):
    """An argument is wrong."""


class FileError(Error, OSError):
    """The system refused a file operation, or a file is damaged."""

    def __init__(self, code: int, message: str) -> None:
        Error.__init__(self, code, message)

    def __str__(self) -> str:
        return str(self.args[0])


class BudgetError(Error, MemoryError):
    """The memory budget, or the system's memory, does not hold it."""


class Busy(Error):
    """Another call, or a generation, is using the object."""


class Cancelled(Error):
    """Somebody asked to stop."""


class ContextFull(Error):
    """The session's window does not hold so many tokens."""


class Suspended(Error):
    """The model is suspended; call again when it is resumed."""


_EXCEPTIONS: dict[int, type[Error]] = {
    lib.KINGLET_ERR_ARG: ArgumentError,
    lib.KINGLET_ERR_IO: FileError,
    lib.KINGLET_ERR_FORMAT: FileError,
    lib.KINGLET_ERR_MEMORY: BudgetError,
    lib.KINGLET_ERR_BUSY: Busy,
    lib.KINGLET_ERR_CANCELLED: Cancelled,
    lib.KINGLET_ERR_CONTEXT_FULL: ContextFull,
    lib.KINGLET_ERR_SUSPENDED: Suspended,
}


_T = TypeVar("_T")


def string(pointer: Any) -> str:
    """A NUL-terminated string of the library's."""
    return str(ffi.string(pointer), "utf-8")


def call(function: Callable[..., int], *arguments: Any) -> int:
    """Calls ``function`` with a place for its error behind ``arguments``; a status below 0 is raised."""
    error = ffi.new("kinglet_error *")
    status = function(*arguments, error)
    if status < 0:
        message = string(error.message)
        raise _EXCEPTIONS.get(status, Error)(status, message)
    return status


def handle(kind: str, free: Callable[[Any], None], function: Callable[..., int], *arguments: Any) -> Any:
    """The object that ``function`` hands out, freed when Python forgets it."""
    out = ffi.new(f"kinglet_{kind} **")
    call(function, *arguments, out)
    return ffi.gc(out[0], free)


def text(function: Callable[..., int], *arguments: Any) -> str | None:
    """The string that ``function`` hands out."""
    out = ffi.new("char **")
    call(function, *arguments, out)
    if out[0] == ffi.NULL:
        return None
    try:
        return string(out[0])
    finally:
        lib.kinglet_string_free(out[0])


def data(kind: type[_T], function: Callable[..., int], *arguments: Any) -> _T:
    """The JSON that ``function`` hands out, a ``kind``."""
    value = json.loads(text(function, *arguments) or "null")
    assert isinstance(value, kind)
    return value


def array(kind: str, function: Callable[..., int], *arguments: Any) -> Any:
    """The array that ``function`` fills when asked a second time, and its length."""
    count = ffi.new("size_t *")
    error = ffi.new("kinglet_error *")
    status = function(*arguments, ffi.NULL, 0, count, error)
    if status < 0 and status != lib.KINGLET_ERR_TOO_SMALL:
        call(function, *arguments, ffi.NULL, 0, count)
    out = ffi.new(f"{kind}[]", max(count[0], 1))
    call(function, *arguments, out, count[0], count)
    return out, count[0]


def struct(kind: str, **fields: Any) -> Any:
    """A struct of the library's with its size and ``fields`` set."""
    value = ffi.new(f"kinglet_{kind} *")
    value.struct_size = ffi.sizeof(value[0])
    for name, field in fields.items():
        setattr(value, name, field)
    return value


def encode(path: str | os.PathLike[str]) -> bytes:
    """A path as the library takes it."""
    return os.fspath(path).encode()
