import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may touch the network

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from langchain_latentmas import LatentService
from langchain_latentmas.service.local import LocalService
from langchain_latentmas.service.server import Server

from .served import client, serving
from .support import PARITY

for name in [name for name in os.environ if name.startswith("LATENTMAS_")]:
    del os.environ[name]
settings.register_profile(
    "latentmas",
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("latentmas")
torch.set_num_threads(1)  # the models are so small that more threads only wait for each other

Parts = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Fresh = Callable[..., LocalService]


@cache
def load_parts(model: str, dtype: str) -> Parts:
    """A parity model and its tokenizer, loaded once; nobody may change its weights."""
    folder = PARITY / model / "model"
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="session")
def parity_service() -> Iterator[Callable[..., LatentService]]:
    """Services of the parity models that a whole session shares, by model, dtype and `realign`."""
    made: dict[tuple[str, str, bool], LatentService] = {}

    def get(model: str = "qwen3-tied", dtype: str = "float64", realign: bool = True) -> LatentService:
        key = (model, dtype, realign)
        if key not in made:
            made[key] = LatentService.load(str(PARITY / model / "model"), device="cpu", dtype=dtype, realign=realign)
        return made[key]

    yield get
    for service in made.values():
        service.close()


@pytest.fixture(scope="session")
def service(parity_service: Callable[..., LatentService]) -> LatentService:
    """Qwen3 in float64, shared by the session: for tests that need no settings and count nothing."""
    return parity_service("qwen3-tied", "float64")


@pytest.fixture(scope="session")
def service32(parity_service: Callable[..., LatentService]) -> LatentService:
    """Qwen3 in float32, shared by the session."""
    return parity_service("qwen3-tied", "float32")


@pytest.fixture
def fresh_service() -> Iterator[Fresh]:
    """Makes services with settings and counters of their own, on weights that the session has loaded."""
    made: list[LocalService] = []

    def make(model: str = "qwen3-tied", dtype: str = "float64", **service_settings: Any) -> LocalService:
        made.append(LocalService.from_model(*load_parts(model, dtype), **service_settings))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server for tests that need no settings and count nothing; on a service of its own."""
    with serving(LocalService.from_model(*load_parts("qwen3-tied", "float64"))) as server:
        yield server


@pytest.fixture(scope="module")
def remote(server: Server) -> Iterator[LatentService]:
    """A client of it."""
    with client(server) as service:
        yield service


@pytest.fixture(scope="session")
def bundled() -> Iterator[LatentService]:
    """The bundled model."""
    with LatentService.load("bundled", device="cpu") as service:
        yield service
