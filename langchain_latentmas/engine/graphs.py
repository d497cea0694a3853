"""CUDA graphs: a decode step is recorded once and replayed, so that no kernel waits for the host to launch it."""

import logging
import threading
import weakref
from collections.abc import Callable, Hashable
from contextlib import suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ..errors import first_line
from .model import LanguageModel, relative_difference

logger = logging.getLogger(__name__)

AGAIN = 64  # steps until recording is tried again where memory was short; to try takes as long as several


class Step(NamedTuple):
    """One decode step of the first rows of the slots."""

    inputs: Tensor
    """What was fed, [rows, hidden]: the thoughts of those that think."""
    hidden: Tensor
    """Last hidden states [rows, hidden]."""


Compute = Callable[[], Step]
"""A step that gives the same again, wherever it writes, until what it reads is changed."""


class Graphs:
    """Recorded steps. Each is compared with what it was recorded from before it is used.

    Attributes:
        fault: Why no step is replayed any more, or None.
    """

    def __init__(self, record: Callable[[Compute], Compute], tolerance: float) -> None:
        """Starts without recorded steps.

        Args:
            record: Makes a step one that replays into tensors of its own.
            tolerance: Largest difference allowed to the step itself, relative, root mean square.
        """
        self.record, self.tolerance = record, tolerance
        self.fault: str | None = None
        self._pause: int | None = None  # steps that are computed until recording is tried again; None: it never failed
        self._recorded: dict[Hashable, Compute] = {}

    @classmethod
    def of(cls, model: LanguageModel) -> Self | None:
        """Those of a model on one CUDA device, or None."""
        if model.device.type != "cuda" or set(model.kv_devices) != {model.device}:
            return None
        return cls(Recorder(model.device), model.tolerance)

    def clear(self) -> None:
        """Forgets what was recorded; the tensors that it reads and writes are no longer the ones in use."""
        self._recorded.clear()

    def step(self, key: Hashable, compute: Compute) -> Step:
        """Replays a step, and records it first if this is the first with its key.

        Args:
            key: Says what the step reads and writes, its shapes included.
            compute: The step.
        """
        if key not in self._recorded:
            if self._pause:
                self._pause -= 1
                return compute()
            expected = Step(*(part.clone() for part in compute()))
            if not all(part.isfinite().all() for part in expected):  # a row overflows: nothing to compare with
                return expected
            replay = self._checked(compute, expected)
            if replay is None:
                return compute()  # anew, since a replay may have written something else
            self._recorded[key] = replay
        # The next replay writes where this one has written.
        return Step(*(part.clone() for part in self._recorded[key]()))

    def _checked(self, compute: Compute, expected: Step) -> Compute | None:
        """A replay that gives what was expected; None where there is none."""
        advice = ""
        try:
            replay = self.record(compute)
            for part in replay():
                part.fill_(torch.nan)  # what a replay leaves as it is must not pass for what it computed
            differences = [relative_difference(a, b) for a, b in zip(replay(), expected, strict=True)]
            if all(difference <= self.tolerance for difference in differences):
                return replay
            self.fault = f"a replayed step differs by {max(map(float, differences)):.1e}"
        except RuntimeError as error:
            why = first_line(error)
            if isinstance(error, torch.OutOfMemoryError):  # which may pass
                if self._pause is None:
                    logger.warning("a step is not recorded as a CUDA graph for now: %s", why)
                self._pause = AGAIN
                return None
            self.fault = why
            advice = "; torch may keep something of a recording that failed: cleaner is a new start, cuda_graphs=False"
        self._recorded.clear()
        logger.warning("CUDA graphs are off, every kernel is launched by itself: %s%s", self.fault, advice)
        return None


class Recorder:
    """Records on one stream of a device, since torch keeps workspaces for every stream that it has computed on."""

    _turn = threading.Lock()  # of the whole process: torch records one graph at a time, and before that waits for all

    def __init__(self, device: torch.device) -> None:
        """Takes a stream.

        Args:
            device: The CUDA device that the steps run on.
        """
        self.stream = torch.cuda.Stream(device)
        self._living: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()

    def __call__(self, compute: Compute) -> Compute:
        """Makes a step one that replays into tensors of its own."""
        if not self._living:  # torch takes no pool up again whose graphs are all gone
            self._pool = torch.cuda.graph_pool_handle()
        caller, graph = torch.cuda.current_stream(self.stream.device), torch.cuda.CUDAGraph()
        # The stream is entered here too: `torch.cuda.graph` stays in it when recording fails.
        with self._turn, torch.cuda.stream(self.stream):
            self.stream.wait_stream(caller)
            try:
                for _ in range(2):  # kernels are chosen and workspaces allocated before anything is recorded
                    compute()
                # Other threads may go on with what they do on the device.
                with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                    step = compute()
            except Exception:
                self._leave_pool()
                raise
            finally:
                caller.wait_stream(self.stream)  # what was begun must not write where the next step does
        self._living.add(graph)

        def replay() -> Step:
            graph.replay()
            return step

        return replay

    def _leave_pool(self) -> None:
        """Does what `torch.cuda.graph` comes to only if a recording succeeds.

        Until then torch's allocator takes one that failed for under way: it gives nothing back to the device, and asks
        a graph that is gone at each allocation of the next one. `torch.cuda.use_mem_pool` ends with the same calls.
        """
        # The first one raises where nothing is under way; older versions of torch call it otherwise.
        with suppress(AttributeError, RuntimeError):
            torch._C._cuda_endAllocateToPool(self.stream.device.index, self._pool)
            torch._C._cuda_releasePool(self.stream.device.index, self._pool)
