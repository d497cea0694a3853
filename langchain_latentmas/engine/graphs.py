"""CUDA graphs: a decode step is recorded once and replayed, so that no kernel waits for the host to launch it."""

import logging
import weakref
from collections.abc import Callable, Hashable
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .model import LanguageModel, relative_difference

logger = logging.getLogger(__name__)


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
            expected = Step(*(part.clone() for part in compute()))
            if not all(part.isfinite().all() for part in expected):  # a row overflows: nothing to compare with
                return expected
            self._recorded[key] = self._checked(compute, expected)
        # The next replay writes where this one has written.
        return Step(*(part.clone() for part in self._recorded[key]()))

    def _checked(self, compute: Compute, expected: Step) -> Compute:
        try:
            replay = self.record(compute)
            for part in replay():
                part.fill_(torch.nan)  # what a replay leaves as it is must not pass for what it computed
            differences = [relative_difference(a, b) for a, b in zip(replay(), expected, strict=True)]
            if all(difference <= self.tolerance for difference in differences):
                return replay
            self.fault = f"a replayed step differs by {max(map(float, differences)):.1e}"
        except RuntimeError as error:
            self.fault = str(error).strip().splitlines()[0]
        self._recorded.clear()
        logger.warning("CUDA graphs are off, every kernel is launched by itself: %s", self.fault)
        return compute


class Recorder:
    """Records on one stream of a device, since torch keeps workspaces for every stream that it has computed on."""

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
        self.stream.wait_stream(caller)
        # Entered here too: `torch.cuda.graph` stays in its stream when recording fails.
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # kernels are chosen and workspaces allocated before anything is recorded
                compute()
            # Other threads may go on with what they do on the device.
            with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode="thread_local"):
                step = compute()
        caller.wait_stream(self.stream)
        self._living.add(graph)

        def replay() -> Step:
            graph.replay()
            return step

        return replay
