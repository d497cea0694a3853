"""The service that is taken where none is given: one per name and process."""

import threading
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import InvalidRequest
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
        InvalidRequest: If a device or a dtype is given for a model that runs elsewhere.
        ModelNotFound: If there is no such model.
        ModelNotSupported: If it cannot think exactly.
    """
    settings = SharedSettings()
    key = (name or settings.service, device or settings.device, dtype or settings.dtype)
    with _lock:
        if key not in _services:
            own: dict[str, Any] = {"device": key[1], "dtype": key[2], "store": settings.store}
            vllm = key[0].startswith(("vllm:", "vllm+"))
            if vllm or "://" in key[0]:  # the model is elsewhere; recipes of vLLM are kept here
                if device or dtype:
                    raise InvalidRequest(f"{key[0]} takes no device and no dtype here; whoever runs its model says so.")
                own = {"store": settings.store} if vllm else {}
            _services[key] = LatentService.load(key[0], **own)
        return _services[key]
