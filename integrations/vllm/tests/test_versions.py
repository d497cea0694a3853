import sys
from importlib import import_module
from types import SimpleNamespace

import latentmas_vllm
import pytest


@pytest.mark.parametrize("version", ["0.31.0", "0.32.0", "0.32.1rc1.dev5+g1234", "0.32.0+cpu"])
def test_versions_that_are_taken(version: str) -> None:
    assert latentmas_vllm.unsupported(version) is None


@pytest.mark.parametrize("version", ["0.30.9", "0.31.0rc1", "0.9.2", "0.33.0", "0.33.0rc1", "dev"])
def test_versions_that_are_refused_with_the_range(version: str) -> None:
    assert str(latentmas_vllm.SUPPORTED) in (latentmas_vllm.unsupported(version) or "")


def test_only_those_who_ask_for_such_a_model_meet_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: dict[str, str] = {}
    registry = SimpleNamespace(register_model=registered.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(__version__="0.33.0", ModelRegistry=registry))
    latentmas_vllm.register()
    assert sorted(registered) == [f"Latent{family}" for family in latentmas_vllm.FAMILIES]
    module, _, _ = registered["LatentQwen3ForCausalLM"].partition(":")
    with pytest.raises(ImportError, match=r"not with 0\.33\.0"):
        import_module(module)
