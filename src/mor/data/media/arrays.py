"""Read a NumPy array out of a pickle without unpickling: nothing named in it is ever called."""

from __future__ import annotations

import pickletools
from typing import Any

import numpy as np

from mor.errors import MorError

# The only names such a pickle may hold: they are recognised, not imported.
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}
_QUIET = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT"}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1"),
    *("SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_MARK = object()


def read_pickled_array(data: bytes, origin: str) -> np.ndarray:
    """The array of plain numbers that `pickle.dumps(array)` wrote, of protocol 2 or newer.

    A small machine runs the pickle's stack with tuples in the place of calls: a name outside the
    four that an array needs, or an opcode that an array does not, ends it.

    Args:
        data: the pickle.
        origin: what to call it in messages.

    Raises:
        MorError: it holds anything else than one array, or its numbers do not fill the shape.
    """
    try:
        made = _run(data)
        (function, *_), (_, shape, (dtype, dtype_state), fortran, raw) = made
        kind, order = dtype[1][0], dtype_state[1]
        if function[1] != "_reconstruct" or dtype[0] != ("numpy", "dtype") or kind[0] not in "uif":
            raise ValueError("it is no array of plain numbers")
        values = np.frombuffer(raw, np.dtype(order.replace("|", "") + kind))
        return values.reshape(shape, order="F" if fortran else "C").copy()
    except (ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        raise MorError(f"{origin} is not a pickled NumPy array: {error}") from error


def _run(data: bytes) -> Any:
    """What the pickle builds: a call is `(function, arguments)`, a build `(object, state)`."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    arg: Any
    for opcode, arg, _ in pickletools.genops(data):
        name = opcode.name
        if name in _QUIET:
            if name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif "PUT" in name:
                memo[int(arg)] = stack[-1]
        elif name in _VALUES:
            stack.append(arg)
        elif name in ("NONE", "NEWTRUE", "NEWFALSE"):
            stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[int(arg)])
        elif name in _TUPLES:
            count = _TUPLES[name]
            stack[len(stack) - count :] = [tuple(stack[len(stack) - count :])]
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            mark = len(stack) - 1 - stack[::-1].index(_MARK)
            stack[mark:] = [tuple(stack[mark + 1 :])]
        elif name in ("STACK_GLOBAL", "GLOBAL"):
            named = tuple(arg.split(" ")) if name == "GLOBAL" else tuple(stack[-2:])
            if named not in _GLOBALS:
                raise ValueError(f"it names {'.'.join(map(str, named))}")
            stack[len(stack) - (0 if name == "GLOBAL" else 2) :] = [named]
        elif name in ("REDUCE", "BUILD"):
            second = stack.pop()
            stack.append((stack.pop(), second))
        elif name == "STOP":
            return stack.pop()
        else:
            raise ValueError(f"it holds the opcode {name}")
    raise ValueError("it is cut short")
