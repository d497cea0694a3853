"""Runs programs that nobody has read: no network, nothing outside of a folder of their own, limits on everything else.

Each program is one process that has locked itself in before it starts (`guard.py`): it has nothing of our environment,
starts no process or thread, opens no socket, sends no signal, and sees no file but Python's own and those in its
folder. The kernel of Linux enforces that without root (seccomp since 3.5, Landlock since 5.13). What a platform cannot
enforce is logged, and stands in `Outcome.missing`.
"""

import functools
import json
import logging
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Literal, NamedTuple

import psutil

from ..errors import SandboxUnavailable

logger = logging.getLogger(__name__)

GUARD = Path(__file__).with_name("guard.py")
TICK = 0.01  # seconds between two looks at a program
GRACE = 0.5  # seconds for a program to end when another one, which it talks with, has ended
AT_ONCE = max(1, (os.cpu_count() or 2) // 2)
"""Calls of `run` at work at a time, of two processes as a rule: their time is limited, and more would share it."""
_ROOM = threading.BoundedSemaphore(AT_ONCE)


class Limits(NamedTuple):
    """What one program may use."""

    seconds: float = 20.0
    """Wall clock."""
    cpu_seconds: int = 10
    memory: int = 1 << 30
    """Bytes of address space."""
    file_size: int = 1 << 20
    """Bytes of the largest file."""
    folder_size: int = 16 << 20
    """Bytes of all its files."""
    files: int = 100
    open_files: int = 64
    output: int = 1 << 20
    """Bytes that it prints."""


class Outcome(NamedTuple):
    """How a program ended."""

    ended: Literal["by itself", "by a signal", "out of time", "out of disk", "out of output", "after another"]
    """"by a signal": out of CPU seconds, or crashed. "after another": one that it talks with ended first."""
    status: int
    """Exit status; negative: the signal."""
    output: str
    errors: str
    seconds: float
    missing: tuple[str, ...]
    """What this platform could not guarantee."""


def run(*programs: str, limits: Limits | None = None) -> list[Outcome]:
    """Runs Python programs side by side to their end, which the limits set at the latest.

    Waits while `AT_ONCE` other calls are at work.

    Args:
        *programs: Sources. Several form a ring: in `PIPES`, each finds the descriptors to read from the one before it
            and to write to the one after it.
        limits: For each of them.

    Returns:
        How each of them ended.

    Raises:
        SandboxUnavailable: If this platform has no resource limits, or no process can be started.
    """
    if os.name != "posix":
        raise SandboxUnavailable("Untrusted code runs on Linux and macOS only: nothing else limits what it uses.")
    limits = limits or Limits()
    with _ROOM, ExitStack() as stack:
        ring: list[tuple[int, int]] = []
        try:
            while len(ring) < len(programs) > 1:
                ring.append(os.pipe())
            ends: list[tuple[int, ...]] = [(ring[i - 1][0], ring[i][1]) for i in range(len(ring))] or [()]
            running = [
                stack.enter_context(_Program(source, limits, pipes))
                for source, pipes in zip(programs, ends, strict=True)
            ]
        except OSError as error:
            raise SandboxUnavailable(f"No program can be started in the sandbox: {error}") from error
        finally:
            for end in sum(ring, ()):
                os.close(end)
        first_end: float | None = None
        while alive := sum(program.alive() for program in running):
            if first_end is None and alive < len(running):
                first_end = time.monotonic()
            if first_end is not None and time.monotonic() > first_end + GRACE:
                for program in running:
                    program.kill("after another")
            time.sleep(TICK)
        outcomes = [program.outcome() for program in running]
    _report(tuple(sorted({what for outcome in outcomes for what in outcome.missing})))
    return outcomes


@functools.cache
def missing() -> tuple[str, ...]:
    """What this platform cannot guarantee; empty on a current Linux.

    Raises:
        SandboxUnavailable: If untrusted code cannot be run here at all.
    """
    return run("pass")[0].missing


class _Program:
    """One program at work, in a folder that goes with it."""

    def __init__(self, source: str, limits: Limits, pipes: Sequence[int]) -> None:
        self.limits = limits
        self.ended: str | None = None
        with ExitStack() as undone:  # unless the program starts
            self.folder = tempfile.mkdtemp(prefix="latentmas-")
            undone.callback(os.rmdir, self.folder)
            self.selector = undone.enter_context(selectors.DefaultSelector())
            read, write = os.pipe()
            self.report = undone.enter_context(os.fdopen(read, "rb"))
            with os.fdopen(write, "wb"), tempfile.TemporaryFile() as text:
                orders = {
                    **limits._asdict(),
                    "report": write,
                    "pipes": list(pipes),
                    "parent": os.getpid(),
                    "processes": len(psutil.pids()) + 32,  # counts those of the user, where it counts at all
                    "readable": _readable(),
                }
                text.write(source.encode(errors="replace"))
                text.seek(0)
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-B", str(GUARD), json.dumps(orders)],
                    stdin=text,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=self.folder,
                    env=_environment(self.folder),
                    pass_fds=[write, *pipes],
                    start_new_session=True,
                )
            undone.pop_all()
        self.begun = time.monotonic()
        self.seconds = 0.0
        self.printed: dict[str, bytearray] = {"output": bytearray(), "errors": bytearray()}
        streams: list[tuple[str, IO[bytes] | None]] = [("output", self.process.stdout), ("errors", self.process.stderr)]
        for name, stream in streams:
            assert stream is not None
            os.set_blocking(stream.fileno(), False)
            self.selector.register(stream, selectors.EVENT_READ, name)

    def alive(self) -> bool:
        """Looks after it: takes what it printed, and ends it where it is out of something."""
        if self.ended is not None:
            return False
        self._read()
        if sum(map(len, self.printed.values())) > self.limits.output:
            self.kill("out of output")
        elif time.monotonic() > self.begun + self.limits.seconds:
            self.kill("out of time")
        elif self._disk_full():
            self.kill("out of disk")
        elif (status := self.process.poll()) is not None:
            self.kill("by itself" if status >= 0 else "by a signal")
        return self.ended is None

    def kill(self, ended: str) -> None:
        """Ends the program and whatever it started."""
        if self.ended is not None:
            return
        self.ended, self.seconds = ended, time.monotonic() - self.begun
        with suppress(psutil.Error):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                child.kill()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._read()

    def outcome(self) -> Outcome:
        """How it ended."""
        os.set_blocking(self.report.fileno(), False)
        output, errors = (
            bytes(self.printed[name][: self.limits.output]).decode(errors="replace") for name in ("output", "errors")
        )
        reported = self.report.read()
        if not reported:
            raise SandboxUnavailable(f"A program could not be locked in: {errors.strip()[-300:] or self.ended}")
        status, missing = self.process.returncode, tuple(json.loads(reported))
        return Outcome(self.ended or "by itself", status, output, errors, self.seconds, missing)  # type: ignore[arg-type]

    def __enter__(self) -> "_Program":
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill("by a signal")
        self.selector.close()
        self.report.close()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self) -> None:
        for key, _ in self.selector.select(0):
            # Once over the limit it is killed, so that this ends.
            while sum(map(len, self.printed.values())) <= self.limits.output:
                try:
                    piece = os.read(key.fd, 1 << 16)
                except BlockingIOError:
                    break
                if not piece:
                    self.selector.unregister(key.fileobj)
                    break
                self.printed[key.data] += piece

    def _disk_full(self) -> bool:
        size = count = 0
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                count += 1
                with suppress(OSError):
                    size += entry.stat(follow_symlinks=False).st_size
                if size > self.limits.folder_size or count > self.limits.files:
                    return True
        return False


def _environment(folder: str) -> dict[str, str]:
    """All that a program sees of the environment."""
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **one_thread}


@functools.cache
def _readable() -> list[str]:
    """Python, the libraries it loads, and what they ask about the machine."""
    system = ["/usr", "/lib", "/lib64", "/nix/store", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero"]
    machine = ["/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"]
    return [sys.prefix, sys.base_prefix, *system, *machine]


@functools.cache
def _report(missing: tuple[str, ...]) -> None:
    for what in missing:
        logger.warning("the sandbox cannot guarantee here: %s", what)
