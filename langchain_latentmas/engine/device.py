"""The device: its memory, how torch is set up for it, what is sent there, and how far the host may run ahead of it."""

import logging
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import Tensor

from ..errors import EngineFailed, first_line

logger = logging.getLogger(__name__)


def device_at_hand() -> str:
    """CUDA if there, else the CPU; aloud where torch was built for CUDA, since a large model would merely be slow."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.version.cuda:
        logger.warning("no CUDA device can be used; running on the CPU. device='cuda' says why")
    return "cpu"


def free_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on a device, what torch keeps there without using it included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return int(psutil.virtual_memory().available)


def free_bytes_for(devices: Sequence[torch.device]) -> int:
    """Bytes that can be allocated for what lies on several devices, in as many equal parts as are named.

    Args:
        devices: Of each part, say of each layer's KV.
    """
    return min(free_bytes(device) * len(devices) // parts for device, parts in Counter(devices).items())


@contextmanager
def memory_for(model: str, device: str | torch.device) -> Iterator[None]:
    """Says what helps where a device has too little memory for a model.

    Args:
        model: Its name.
        device: Where it is to lie; "auto" for all GPUs.

    Raises:
        EngineFailed: If torch runs out of the device's memory meanwhile.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        place = torch.device("cuda" if device == "auto" else device)
        raise EngineFailed(
            f"{model} does not fit on {place}, where {free_bytes(place) / 1e9:.1f} GB are free now "
            f"({first_line(error)}). Free some there, or take a narrower dtype, quantization or a lower max_positions."
        ) from error


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on a device; to a GPU it goes from pinned memory, or else the host would wait for it.

    Args:
        numbers: Nobody may write into it any more.
        device: Where it is needed.
    """
    if device.type == "cuda":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def prepare(device: torch.device) -> None:
    """Sets torch up for models on a device, in the whole process."""
    if device.type == "cuda":
        # On H100 and H200 torch prefers cuDNN's attention from 2.11 on. It plans for each exact shape anew, and keeps
        # all plans: 25 to 37 ms of the host's time are reported for each, and every prefill has a new shape. vLLM
        # turns it off too.
        torch.backends.cuda.enable_cudnn_sdp(False)


class Pace:
    """Keeps the host at most two ticks ahead of a GPU.

    Ticks of thinkers ask the GPU for nothing, so without this the host queues all steps of a think at once: whoever
    comes meanwhile waits for all of them, steps are told that were not taken yet, and who leaves is noticed late.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts without ticks.

        Args:
            device: The CUDA device that the ticks run on.
        """
        self.device = device
        self._queued: deque[torch.cuda.Event] = deque()

    def keep(self) -> None:
        """Called once a tick is queued; waits until the one before it is done."""
        event = torch.cuda.Event(blocking=True)  # asleep meanwhile: one tick is still queued while this thread wakes up
        event.record(torch.cuda.current_stream(self.device))
        self._queued.append(event)
        if len(self._queued) > 1:
            self._queued.popleft().synchronize()
