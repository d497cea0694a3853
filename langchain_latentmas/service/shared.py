"""The service that is taken where none is given: one per name and process."""

import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import Field, JsonValue
from pydantic_settings import BaseSettings, SettingsConfigDict

from ..errors import InvalidRequest, ModelNotFound, ModelNotSupported
from .base import LatentService


class SharedSettings(BaseSettings):
    """What is loaded where no service is given; each field is an environment variable, `LATENTMAS_SERVICE` and so on.

    Attributes:
        service: What `LatentService.load` takes, the address of a server among it.
        device: "cuda", "cpu", ...; None lets the service choose.
        dtype: Name of a torch dtype, or "auto".
        store: Folder for recipes; None keeps them in the process.
        options: More settings of the model service, as JSON: see `langchain_latentmas.service.local.LocalSettings`.
    """

    model_config = SettingsConfigDict(env_prefix="LATENTMAS_")

    service: str = "bundled"
    device: str | None = None
    dtype: str = "auto"
    store: Path | None = None
    options: dict[str, JsonValue] = Field(default_factory=dict)

    def __init__(self, **given: Any) -> None:
        """Reads the environment.

        Args:
            **given: Goes before it.

        Raises:
            InvalidRequest: If it cannot be read.
        """
        try:
            super().__init__(**given)
        except ValueError as error:  # no JSON, or of another type
            raise InvalidRequest(f"LATENTMAS_... in the environment cannot be read: {error}") from error

    def key(self, name: str | None, device: str | None, dtype: str | None) -> tuple[str, str | None, str]:
        """Name, device and dtype of the service that these stand for; what is None is taken from here."""
        return name or self.service, device or self.device, dtype or self.dtype

    def loading(self, name: str, device: str | None = None, dtype: str | None = None) -> dict[str, Any]:
        """What `LatentService.load` gets besides a name, by where that model runs.

        Args:
            name: What `LatentService.load` takes.
            device: Goes before `device`.
            dtype: Goes before `dtype`.

        Raises:
            InvalidRequest: If a device or a dtype is given for a model that runs elsewhere.
        """
        if not ("://" in name or name.startswith("vllm:")):
            own = {"device": device or self.device, "dtype": dtype or self.dtype, "store": self.store}
            return {**own, **self.options}
        if device or dtype:
            raise InvalidRequest(f"{name} takes no device and no dtype here; whoever runs its model says so.")
        # Of vLLM recipes are kept and prompts encoded here, of `latentmas serve` nothing.
        return {"store": self.store, **self.options} if name.startswith("vllm") else {}

    def load(
        self,
        name: str,
        device: str | None = None,
        dtype: str | None = None,
        *,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> LatentService:
        """Loads a service; an error about one of `self.options` says that it comes from `LATENTMAS_OPTIONS`.

        Args:
            name: What `LatentService.load` takes.
            device: Goes before `device`.
            dtype: Goes before `dtype`.
            options: Go before all that is said here.

        Raises:
            InvalidRequest: If a device or a dtype is given for a model that runs elsewhere, or a setting is unknown or
                out of range.
            ModelNotFound: If there is no such model.
            ModelNotSupported: If it cannot think exactly, or not with these settings.
        """
        own = self.loading(name, device, dtype)
        try:
            return LatentService.load(name, **{**own, **options})
        except (InvalidRequest, ModelNotFound, ModelNotSupported) as error:
            said = str(error).partition(" Settings: ")[0]  # what follows are all settings that there are
            heeded = (self.options.keys() & own.keys()) - options.keys()
            if any(re.search(rf"\b{re.escape(option)}\b", said) for option in heeded):
                raise type(error)(f"LATENTMAS_OPTIONS: {error}") from error
            raise


_services: dict[tuple[int, str, str | None, str], LatentService] = {}  # by process: a fork takes no threads along
_loading = threading.Lock()  # one at a time: meanwhile transformers changes torch's default dtype, for all threads


def loaded(name: str | None = None, device: str | None = None, dtype: str | None = None) -> LatentService | None:
    """What `shared_service` would return if it has nothing to load, else None; waits for nothing."""
    return _usable(SharedSettings().key(name, device, dtype))


def shared_service(name: str | None = None, device: str | None = None, dtype: str | None = None) -> LatentService:
    """The process-wide service of a name, device and dtype, loaded with the first call, and anew once it was closed.

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
    key = settings.key(name, device, dtype)
    if (service := _usable(key)) is not None:  # whatever else is being loaded, which may take minutes
        return service
    with _loading:
        if (service := _usable(key)) is None:
            service = settings.load(key[0], device, dtype)
            _services[os.getpid(), *key] = service
        return service


def _usable(key: tuple[str, str | None, str]) -> LatentService | None:
    service = _services.get((os.getpid(), *key))
    return None if service is None or service.closed else service
