"""Where and with what a measurement ran."""

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import psutil

PACKAGES = ("langchain-latentmas", "torch", "transformers", "langgraph", "langchain-core")


def machine(device: object = "cpu") -> dict[str, Any]:
    """Where and with what this runs; the load at the start tells whether anything else did too.

    Args:
        device: The model's, or its name.

    Returns:
        Plain JSON.
    """
    import torch

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "device": torch.cuda.get_device_name(str(device)) if str(device).startswith("cuda") else str(device),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := version_of(name))},
    }


class Steal:
    """What the host of a virtual machine takes from it, from when this is made."""

    def __init__(self) -> None:
        """Begins to count."""
        self._begun = psutil.cpu_times()

    @property
    def share(self) -> float | None:
        """Of all processors' time, what went to others while something here was ready to run; None if nobody tells."""
        now = psutil.cpu_times()
        if not hasattr(now, "steal"):
            return None
        passed = sum(now) - sum(self._begun)
        return (now.steal - self._begun.steal) / passed if passed else 0.0


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def version_of(package: str) -> str | None:
    """The installed version of a distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
