"""The service that is taken where none is given: one per name and process."""

import threading
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, SettingsConfigDict

from .base import LatentService


class SharedSettings(BaseSettings):
    """What is loaded where no service is given; each field is an environment variable, `LATENTMAS_SERVICE` and so on.

    Attributes:
        service: What `LatentService.load` takes, the address of a server among it.
        device: "cuda", "cpu", ...; None lets the service choose.
        dtype: Name of a torch dtype, or "auto".
        store: Folder for recipes; None keeps them in the process.
    """

    model_config = SettingsConfigDict(env_prefix="LATENTMAS_")

    service: str = "bundled"
    device: str | None = None
    dtype: str = "auto"
    store: Path | None = None


_services: dict[tuple[str, str | None, str], LatentService] = {}
_lock = threading.Lock()


def shared_service(name: str | None = None, device: str | None = None, dtype: str | None = None) -> LatentService:
    """The process-wide service of a name, device and dtype, loaded with the first call.

    Args:
        name: What `LatentService.load` takes; None takes `LATENTMAS_SERVICE`, else the bundled model.
        device: "cuda", "cpu", ...; None takes `LATENTMAS_DEVICE`, else lets the service choose.
        dtype: Name of a torch dtype, or "auto"; None takes `LATENTMAS_DTYPE`, else "auto".

    Raises:
        ModelNotFound: If there is no such model.
        ModelNotSupported: If it cannot think exactly.
    """
    settings = SharedSettings()
    key = (name or settings.service, device or settings.device, dtype or settings.dtype)
    with _lock:
        if key not in _services:
            own: dict[str, Any] = {"device": key[1], "dtype": key[2], "store": settings.store}
            if "://" in key[0]:  # a server has its own; recipes of vLLM are kept here
                own = {"store": settings.store} if key[0].startswith("vllm+") else {}
            _services[key] = LatentService.load(key[0], **own)
        return _services[key]
