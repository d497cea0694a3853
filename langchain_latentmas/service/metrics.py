"""What Prometheus reads of a server."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily as Total
from prometheus_client.core import GaugeMetricFamily as Gauge
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from .turns import Turns

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)

Info = dict[str, Any]
Queues = Mapping[str, Mapping[str, Turns]]
"""By name, then by tenant; several tenants may share one."""

_SERVICE: tuple[tuple[type[Gauge | Total], bool, str, str, str], ...] = (
    (Gauge, True, "rows", "live_rows", "Rows in the tick."),
    (Gauge, True, "waiting", "waiting_rows", "Rows that have no slot yet."),
    (Total, True, "ticks", "ticks", "Forward passes."),
    (Total, True, "thoughts", "thoughts", "Latent steps taken."),
    (Total, True, "tokens", "tokens", "Tokens decoded."),
    (Total, True, "prefilled", "prefilled_positions", "Positions prefilled."),
    (Total, True, "reused", "reused_positions", "Prompt positions copied from a kept prompt that begins alike."),
    (Gauge, False, "kv_bytes", "kv_bytes", "KV kept on the device."),
    (Gauge, False, "kv_budget", "kv_budget_bytes", "KV that may be kept on the device."),
    (Gauge, False, "kv_cpu_bytes", "kv_cpu_bytes", "KV kept in CPU memory."),
    (Gauge, False, "kv_disk_bytes", "kv_disk_bytes", "KV kept on the disk."),
    (Gauge, False, "store_bytes", "store_bytes", "Recipes in the store."),
    (Total, False, "kv_hits", "kv_hits", "Segments whose KV was on the device."),
    (Total, False, "kv_cpu_hits", "kv_cpu_hits", "Segments whose KV came from CPU memory."),
    (Total, False, "kv_disk_hits", "kv_disk_hits", "Segments whose KV came from the disk."),
    (Total, False, "rebuilds", "kv_rebuilds", "Prefills that brought back KV that was nowhere."),
    (Total, False, "evictions", "kv_evictions", "Segments whose KV had to leave the device."),
)
"""Kind, whether the services of tenants share it (else it is added up), key of `LatentService.info`, name, help."""


class Metrics:
    """The counters of one server.

    Attributes:
        registry: Everything that `/metrics` shows.
        requests: By route and status.
        seconds: From the request's arrival to the end of the reply, by route.
        queued: Seconds in a queue, by its name.
        first: Seconds from the arrival to the first latent step or token that the server sends, by route.
    """

    def __init__(self, queues: Queues, infos: Callable[[], Sequence[Info]]) -> None:
        """Starts at zero.

        Args:
            queues: The server's queues.
            infos: `LatentService.info` of every tenant's service.
        """
        self.registry = CollectorRegistry()
        self.requests = Counter("latentmas_requests", "Requests.", ("route", "status"), registry=self.registry)
        self.seconds = self._histogram("latentmas_request_seconds", "Seconds that requests took.", ("route",))
        self.queued = self._histogram("latentmas_queue_seconds", "Seconds that requests waited.", ("queue",))
        self.first = self._histogram("latentmas_first_event_seconds", "Seconds to the first step or token.", ("route",))
        self.registry.register(_Service(queues, infos))
        ProcessCollector(registry=self.registry)

    def _histogram(self, name: str, what: str, labels: Sequence[str]) -> Histogram:
        return Histogram(name, what, labels, buckets=SECONDS, registry=self.registry)


class _Service(Collector):
    """Reads queues and services when it is asked."""

    def __init__(self, queues: Queues, infos: Callable[[], Sequence[Info]]) -> None:
        self.queues, self.infos = queues, infos

    def describe(self) -> Iterator[Metric]:
        return iter(())  # so that registering does not collect

    def collect(self) -> Iterator[Metric]:
        waiting = Gauge("latentmas_queue_length", "Requests that wait.", labels=("queue",))
        running = Gauge("latentmas_running_requests", "Requests whose wait is over, at work.", labels=("queue",))
        refused = Total("latentmas_refused", "Requests that a full queue sent away.", labels=("queue",))
        for name, by_tenant in self.queues.items():
            turns = set(by_tenant.values())
            waiting.add_metric([name], sum(each.waiting for each in turns))
            running.add_metric([name], sum(each.running for each in turns))
            refused.add_metric([name], sum(each.refused for each in turns))
        yield from (waiting, running, refused)
        infos = self.infos()
        for kind, shared, key, name, what in _SERVICE:
            value = infos[0][key] if shared else sum(info[key] for info in infos)
            yield kind(f"latentmas_{name}", what, value)
