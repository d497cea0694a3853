from typing import Any

import pytest

from langchain_latentmas.service.metrics import Metrics
from langchain_latentmas.service.turns import Turns

from ..conftest import Fresh


def shown(*infos: dict[str, Any]) -> dict[str, float]:
    families = Metrics(Turns(1, 1), lambda: infos).registry.collect()
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_what_tenants_share_counts_once_and_the_rest_is_added_up(fresh_service: Fresh) -> None:
    service = fresh_service()
    tenant = service.tenants(["anne"])["anne"]
    service.think("Plan.", steps=2)
    tenant.think("Plan.", steps=3)
    values = shown(service.info(), tenant.info())
    assert values["latentmas_thoughts_total"] == 5
    assert values["latentmas_kv_bytes"] == service.info()["kv_bytes"] + tenant.info()["kv_bytes"] > 0


def test_a_count_that_no_service_has_is_not_shown_as_none(fresh_service: Fresh) -> None:
    with pytest.raises(KeyError, match="ticks"):
        shown({key: value for key, value in fresh_service().info().items() if key != "ticks"})
