from contextlib import suppress
from typing import Any

import pytest

from langchain_latentmas.errors import ServiceBusy
from langchain_latentmas.service.metrics import Metrics
from langchain_latentmas.service.turns import Turns

from ..conftest import Fresh


def shown(*infos: dict[str, Any]) -> dict[str, float]:
    families = Metrics({}, lambda: infos).registry.collect()
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_what_tenants_share_counts_once_and_the_rest_is_added_up(fresh_service: Fresh) -> None:
    service = fresh_service()
    tenant = service.tenants(["anne"])["anne"]
    service.think("Plan.", steps=2)
    tenant.think("Plan.", steps=3)
    values = shown(service.info(), tenant.info())
    assert values["latentmas_thoughts_total"] == 5
    assert values["latentmas_kv_bytes"] == service.info()["kv_bytes"] + tenant.info()["kv_bytes"] > 0


async def test_queues_are_counted_by_name_and_one_that_tenants_share_once(fresh_service: Fresh) -> None:
    work, anne, bert = Turns(2, 0), Turns(1, 0), Turns(1, 0)
    queues = {"work": {"anne": work, "bert": work}, "import": {"anne": anne, "bert": bert}}
    info = fresh_service().info()
    registry = Metrics(queues, lambda: [info]).registry
    async with work.turn("anne", ""), anne.turn("anne", ""), bert.turn("bert", ""):
        with suppress(ServiceBusy):
            async with anne.turn("anne", ""):
                pass
        values = {
            name: [registry.get_sample_value(f"latentmas_{name}", {"queue": queue}) for queue in queues]
            for name in ("queue_length", "running_requests", "refused_total")
        }
    assert values == {"queue_length": [0, 0], "running_requests": [1, 2], "refused_total": [0, 1]}


def test_a_count_that_no_service_has_is_not_shown_as_none(fresh_service: Fresh) -> None:
    with pytest.raises(KeyError, match="ticks"):
        shown({key: value for key, value in fresh_service().info().items() if key != "ticks"})
