"""How fast the device's memory is."""

import time

import torch

from ..engine.device import free_bytes

COPIED = 1 << 30  # bytes; beyond any cache
FAST = 8  # copies at a time on a GPU, where one takes so little that to start it and to wait for it counts


def in_gb(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.1f} GB"


def clock(device: torch.device) -> float:
    """Seconds, once everything that was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class Copy:
    """A large copy within a device's memory, by which its bandwidth is measured.

    Counted are the bytes read and the bytes written. A processor that reads a line before it writes it moves half as
    much again, which is not counted: this is the speed that a program sees.
    """

    def __init__(self, device: torch.device, size: int | None = None) -> None:
        """Allocates source and target.

        Args:
            device: Whose memory.
            size: Bytes to copy; None takes 1 GiB, or less where there is little memory.
        """
        size = size or min(COPIED, free_bytes(device) // 8)
        # Written, since pages that nobody wrote are all one and the same page of zeros.
        self.source = torch.full((size // 4,), 1.0, device=device)
        self.target = torch.full_like(self.source, 2.0)
        self.bytes = 2 * self.source.nbytes
        self.run()

    def run(self) -> float:
        """Copies; returns bytes per second."""
        times = FAST if self.source.device.type == "cuda" else 1
        begun = clock(self.source.device)
        for _ in range(times):
            self.target.copy_(self.source)
        return times * self.bytes / (clock(self.source.device) - begun)
