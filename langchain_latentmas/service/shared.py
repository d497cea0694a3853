"""The service that is taken where none is given: one per name and process."""

import threading
from pathlib import Path

from pydantic_settings import BaseSettings, SettingsConfigDict

from .base import LatentService


class SharedSettings(BaseSettings):
    """What is loaded where no service is given; each field is an environment variable, `LATENTMAS_SERVICE` and so on.

    Attributes:
        service: What `LatentService.load` takes.
        device: "cuda", "cpu", ...; None lets the service choose.
        dtype: Name of a torch dtype, or "auto".
        store: Folder for recipes; None keeps them in the process.
    """

    model_config = SettingsConfigDict(env_prefix="LATENTMAS_")

    service: str = "bundled"
    device: str | None = None
    dtype: str = "auto"
    store: Path | None = None


_services: dict[str, LatentService] = {}
_lock = threading.Lock()


def shared_service(name: str | None = None) -> LatentService:
    """The process-wide service of a name, loaded with the first call.

    Args:
        name: What `LatentService.load` takes; None takes `LATENTMAS_SERVICE`, else the bundled model.

    Raises:
        ModelNotFound: If there is no such model.
        ModelNotSupported: If it cannot think exactly.
    """
    settings = SharedSettings()
    name = name or settings.service
    with _lock:
        if name not in _services:
            _services[name] = LatentService.load(
                name, device=settings.device, dtype=settings.dtype, store=settings.store
            )
        return _services[name]
