"""``RouterMetrics``: what the router counts, for Prometheus. Replicas have metrics of their own, not passed on."""

from __future__ import annotations

from deepseek.serve.router.replica import Fleet
from deepseek.serve.server.metrics import Family, render

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
REPLICA = ("replica",)


class RouterMetrics:
    """Counters of one router; gauges are read from the fleet when somebody asks."""

    def __init__(self) -> None:
        self._answers = _counter("answers", "Answers of replicas, by status.", "replica", "status")
        self._errors = _counter(
            "errors", "Requests without a whole answer: connect, broken, silence.", "replica", "kind"
        )
        self._refusals = _counter("refusals", "Requests declined (429, 503, not begun), so that another replica was "
                                  "asked, if there was one.", "replica", "why")  # fmt: skip
        self._ejections = _counter("ejections", "Times that failures in a row ejected a replica.", "replica")
        self._retries = _counter("retries", "Requests given to another replica because this one was lost with them.",
                                 "replica")  # fmt: skip
        self._nobody = _counter("unanswered", "Requests that no replica was there for.")
        self._gone = _counter("clients_gone", "Clients that left before the end of their answer.")
        self._head = Family(
            "deepseek_router_head_seconds",
            "Seconds until the head of an answer.",
            "histogram",
            REPLICA,
            SECONDS,
        )
        self._stalled = _counter("clients_stalled", "Clients cut because they took nothing of their answer.")
        for family in (self._nobody, self._gone, self._stalled):
            family.touch()

    def answered(self, replica: str, status: int, seconds: float) -> None:
        self._answers.add(1, replica, str(status))
        self._head.observe(seconds, replica)

    def failed(self, replica: str, kind: str) -> None:
        self._errors.add(1, replica, kind)

    def refused(self, replica: str, why: str) -> None:
        self._refusals.add(1, replica, why)

    def retried(self, replica: str) -> None:
        self._retries.add(1, replica)

    def ejected(self, replica: str) -> None:
        self._ejections.add(1, replica)

    def nobody(self) -> None:
        self._nobody.add(1)

    def gone(self) -> None:
        self._gone.add(1)

    def stalled(self) -> None:
        self._stalled.add(1)

    def render(self, fleet: Fleet, inside: int) -> bytes:
        """All of it, in Prometheus' text format."""
        ready = Family(
            "deepseek_router_replica_ready", "1: the replica is ready and not ejected.", "gauge", REPLICA
        )
        outstanding = Family(
            "deepseek_router_outstanding", "Requests that a replica is working on.", "gauge", REPLICA
        )
        inside_now = Family("deepseek_router_inside", "Requests passing through.", "gauge")
        inside_now.set(inside)
        for replica in fleet.replicas:
            ready.set(float(replica.ready and not replica.ejected), replica.name)
            outstanding.set(replica.outstanding, replica.name)
        return render(
            [ready, outstanding, inside_now, *(v for v in vars(self).values() if isinstance(v, Family))]
        )


def _counter(name: str, about: str, *labels: str) -> Family:
    return Family(f"deepseek_router_{name}_total", about, "counter", labels)
