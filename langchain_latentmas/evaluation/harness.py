"""What runs in the sandboxes of a program and of its tests: they call each other with plain data only.

Were a program to run in the process of its own tests, it could end that process, print what they print, replace what
they compare with, or return a value that equals everything. So the tests run in a process of their own, and a call
crosses as bytes. Standard library only: `graders.py` sends this file's text in front of `serve(...)` or `check(...)`.
"""

import builtins
import io
import itertools
import pickle
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NoReturn

BROKEN = 3
"""Exit status of tests that are wrong themselves, whatever the program does."""
LARGEST, LONGEST = 64 << 20, 1_000_000  # bytes of a value, items of an iterator
PLAIN = {
    "builtins": "complex set frozenset bytearray range slice int float str list dict tuple bool".split(),
    "collections": "OrderedDict Counter deque defaultdict".split(),
    "datetime": "date datetime time timedelta".split(),
    "decimal": ["Decimal"],
    "fractions": ["Fraction"],
}
"""Types whose values may cross; unpickling makes no others and sets no attributes, so that no value does anything."""


VIEWS: dict[type[Iterable[Any]], tuple[str, Callable[[Any], Any]]] = {
    type({}.keys()): ("keys", lambda items: dict.fromkeys(items).keys()),
    type({}.values()): ("values", lambda items: dict(enumerate(items)).values()),
    type({}.items()): ("items", lambda items: dict(items).items()),
}
"""What a dictionary shows of itself crosses as a list, and is made again."""


class PlainPickler(pickle.Pickler):
    """Turns what NumPy made into plain data, however deep in a value it is, and takes views of dictionaries along."""

    def persistent_id(self, obj: Any) -> Any:
        """See `pickle.Pickler`."""
        if type(obj).__module__ == "numpy":
            return "value", obj.tolist()
        if isinstance(obj, tuple(VIEWS)):
            return next((kind, list(obj)) for view, (kind, _) in VIEWS.items() if isinstance(obj, view))
        return None


def _sets_attributes(unpickler: pickle.Unpickler) -> NoReturn:
    raise TypeError("what sets attributes is no plain data")


class PlainUnpickler(pickle._Unpickler):  # the one in Python: an opcode can be taken out of it
    """Makes values of plain types only, without attributes: those of a type would hold for all of its values."""

    dispatch: ClassVar[dict[int, Callable[[pickle.Unpickler], None]]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: _sets_attributes,
    }

    def persistent_load(self, pid: Any) -> Any:
        """See `pickle.Unpickler`."""
        return {"value": lambda value: value, **dict(VIEWS.values())}[pid[0]](pid[1])

    def find_class(self, module: str, name: str) -> Any:
        """See `pickle.Unpickler`."""
        if name not in PLAIN.get(module, ()):
            raise TypeError(f"{module}.{name} is no plain data")
        return super().find_class(module, name)


def serve(pipes: Sequence[int], code: str, name: str) -> None:
    """Runs a program, then answers calls of its function `name` until nobody asks any more."""
    module: dict[str, Any] = {"__name__": "program"}
    exec(compile(code, "program", "exec"), module)
    function = module[name]
    while (asked := _receive(pipes[0])) is not None:
        args, kwargs = pickle.loads(asked)
        try:
            value = function(*args, **kwargs)
            if isinstance(value, Iterator):
                answer = "iterator", list(itertools.islice(value, LONGEST))
            else:
                answer = "value", value
            pickled = io.BytesIO()
            PlainPickler(pickled).dump(answer)
            made = pickled.getvalue()
            PlainUnpickler(io.BytesIO(made)).load()
        except Exception as error:
            made = pickle.dumps(("raised", (type(error).__name__, str(error)[:1000])))
        _send(pipes[1], made)


def check(pipes: Sequence[int], before: str, tests: str, name: str) -> None:
    """Runs tests against the function that the other program serves; ends with status 0 only if all of them pass.

    Args:
        pipes: To read from and write to.
        before: Code that the tests need, say helper functions.
        tests: Either statements that call the function, or a function `check(candidate)`.
        name: The function.
    """
    calls = 0

    def candidate(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        try:
            asked = pickle.dumps((args, kwargs))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            _broken(f"they call {name} with what cannot cross to it: {error}")
        _send(pipes[1], asked)
        answer = _receive(pipes[0])
        if answer is None:
            raise AssertionError("the program ended before its tests did")
        kind, value = PlainUnpickler(io.BytesIO(answer)).load()
        if kind == "raised":
            raised: Any = getattr(builtins, str(value[0]), None)
            known = isinstance(raised, type) and issubclass(raised, Exception)
            raise (raised if known else RuntimeError)(value[1])
        return iter(value) if kind == "iterator" else value

    module: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(before, "before", "exec"), module)
        module |= {name: candidate, "candidate": candidate}
        exec(compile(tests, "tests", "exec"), module)
        if (whole := module.get("check")) not in (None, candidate):
            whole(candidate)
    except Exception as error:
        if calls:
            raise
        _broken(f"{type(error).__name__}: {error}")  # whatever the program is: it had no part in this
    if not calls:
        _broken(f"they never call {name}")


def _broken(why: str) -> NoReturn:
    print(why, file=sys.stderr)
    sys.exit(BROKEN)


def _send(to: int, data: bytes) -> None:
    with open(to, "wb", closefd=False) as pipe:
        pipe.write(struct.pack("Q", len(data)) + data)


def _receive(at: int) -> bytes | None:
    with open(at, "rb", buffering=0, closefd=False) as pipe:
        head = _read(pipe, 8)
        if head is None or (size := struct.unpack("Q", head)[0]) > LARGEST:
            return None
        return _read(pipe, size)


def _read(pipe: io.FileIO, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        piece = pipe.read(min(size - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)
