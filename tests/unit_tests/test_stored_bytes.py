"""What the KV of stored memories takes: the bytes that the model's shape says, once, and no hidden copies."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from langchain_latentmas import LatentRef
from langchain_latentmas.engine.kv import AnyKV
from langchain_latentmas.service.local import LocalService

from ..conftest import Fresh
from ..support import at_once, messages, say
from .test_kv_pool import QUESTION, experts


def storage_bytes(kvs: Iterable[AnyKV]) -> int:
    """Bytes of memory behind some KVs: what a tensor is a view of counts whole, and what several share once."""
    tensors = [tensor for kv in kvs for side in kv for tensor in side]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def kept(service: LocalService) -> list[AnyKV]:
    pool = service._pool
    return [*pool.kept._values.values(), *pool.spilled._values.values()]


def positions(service: LocalService, refs: Iterable[LatentRef]) -> int:
    """Of all segments that these memories consist of, each once."""
    return sum({p.id: p.positions for ref in refs for p in service._lineage.line(ref["id"])}.values())


def test_sixteen_readers_of_a_memory_add_their_own_positions_only(fresh_service: Fresh) -> None:
    service = fresh_service()
    plan = service.think(messages("Plan " * 60), steps=5, agent="planner")
    each = service.info()["kv_bytes_per_position"]
    assert storage_bytes(kept(service)) == plan["positions"] * each
    said = at_once([lambda i=i: say(service, messages(f"Go {i}."), [plan]).ref for i in range(16)])
    own = sum(ref["positions"] - plan["positions"] for ref in said)
    assert service.info()["kv_segments"] == 17
    assert storage_bytes(kept(service)) == (plan["positions"] + own) * each


@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_whatever_happened_a_segment_takes_its_bytes_once(fresh_service: Fresh, merge: str, kv_dtype: str) -> None:
    """Chains, merges, rebuilds of several segments in one prefill, speaking, in batches that made the slots grow."""
    service = fresh_service(merge=merge, kv_dtype=kv_dtype)
    plan = service.think(messages("Plan."), steps=3)
    refs = at_once([lambda i=i: service.think(messages("x" * 30 * i), [plan], steps=i, agent=str(i)) for i in range(6)])
    refs.append(service.think(QUESTION, refs[:3], steps=2))
    refs.append(say(service, QUESTION, [refs[-1]]).ref)
    for evicted in (False, True):
        if evicted:
            service._pool.kept.clear()
            for ref in refs:
                service.memory(ref)
        assert service.info()["kv_segments"] == len(refs) + 1
        assert storage_bytes(kept(service)) == service.info()["kv_bytes"]
    plain = positions(service, refs) * service.info()["kv_bytes_per_position"]
    assert service.info()["kv_bytes"] == plain if kv_dtype == "auto" else service.info()["kv_bytes"] < plain / 3


@pytest.mark.parametrize("merge", ["rotate", "rebuild"])
def test_an_edge_that_is_read_turned_or_computed_anew_stores_nothing_more(fresh_service: Fresh, merge: str) -> None:
    service = fresh_service(merge=merge)
    refs = experts(service, 3)
    before = storage_bytes(kept(service))
    for order in ([0, 1, 2], [2, 1, 0], [1, 2]):
        service.lens(service.think(QUESTION, [refs[i] for i in order], steps=1))
    own = positions(service, refs)
    judged = service.info()["kv_bytes"] // service.info()["kv_bytes_per_position"] - own
    assert storage_bytes(kept(service)) - before == judged * service.info()["kv_bytes_per_position"]
    assert service.info()["kv_segments"] == 6


@pytest.mark.parametrize("settings", [{"kv_cpu_budget": "1GiB"}, {"kv_disk_budget": "1GiB"}])
def test_what_leaves_the_device_and_comes_back_is_there_once(
    fresh_service: Fresh, tmp_path: Path, settings: dict[str, Any]
) -> None:
    service = fresh_service(store=tmp_path, kv_budget=0, **settings)
    refs = experts(service, 3)
    if service._pool.disk:
        service._pool.disk.flush()
    service._pool.kept.limit = 1 << 30
    for ref in refs * 2:
        service.memory(ref)
    assert len(kept(service)) == 3
    assert storage_bytes(kept(service)) == positions(service, refs) * service.info()["kv_bytes_per_position"]
    assert service.info()["rebuilds"] == 0


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("model", ["qwen3-tied", "llama-untied"])
def test_a_position_takes_what_the_shape_of_the_model_says(fresh_service: Fresh, model: str, dtype: str) -> None:
    service = fresh_service(model, dtype)
    config = service.model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    assert service.info()["kv_bytes_per_position"] == numbers * getattr(torch, dtype).itemsize
    ref = service.think(messages("Plan."), steps=3)
    assert service.info()["kv_bytes"] == ref["positions"] * numbers * getattr(torch, dtype).itemsize


def test_a_memory_that_is_shown_is_a_copy(fresh_service: Fresh) -> None:
    """Whoever writes into it harms no reader."""
    service = fresh_service()
    ref = service.think(messages("Plan."), steps=3)
    shown: list[Tensor] = list(service.memory(ref).keys)
    behind = {t.untyped_storage().data_ptr() for kv in kept(service) for t in kv.keys}
    assert not behind & {t.untyped_storage().data_ptr() for t in shown}
