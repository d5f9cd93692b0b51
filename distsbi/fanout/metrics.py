"""What a catalog or a simulation tells Prometheus, by way of Ray.

    distsbi_catalog_rows_total, distsbi_catalog_draws_total, distsbi_catalog_failed_shards_total    counters
    distsbi_catalog_shards_in_flight                                                                gauge
    distsbi_simulation_rows_total, distsbi_simulation_pairs_total, ...                              the same of simulations

Ray puts `ray_` before each name. Each has a tag `out`, the output folder.
"""

from typing import Any, Self


class Metrics:
    """Counters of one call, at whose end (that of a `with`) nothing is in flight. Without Ray they count nothing.

    Args:
        out: the output folder.
        nsamples: draws per good row.
        ray: whether this process is connected to Ray.
        of: "catalog" or "simulation".
    """

    def __init__(self, out: str, nsamples: int, ray: bool, of: str = "catalog"):
        self._nsamples = nsamples
        self._made: dict[str, Any] = {}
        if not ray:
            return
        from ray.util import metrics

        self._made_of_good = "draws" if of == "catalog" else "pairs"
        for kind, name, says in (
            (metrics.Counter, "rows", "Rows finished."),
            (metrics.Counter, self._made_of_good, f"{self._made_of_good.capitalize()} finished."),
            (metrics.Counter, "failed_shards", "Attempts at shards that failed."),
            (metrics.Gauge, "shards_in_flight", "Shards that workers hold."),
        ):
            self._made[name] = kind(f"distsbi_{of}_{name}", says, ("out",))
            self._made[name].set_default_tags({"out": out})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.in_flight(0)

    def done(self, rows: int, good: int) -> None:
        if self._made:
            self._made["rows"].inc(rows)
            if good:  # Ray refuses an increment of nothing
                self._made[self._made_of_good].inc(good * self._nsamples)

    def failed(self) -> None:
        if self._made:
            self._made["failed_shards"].inc()

    def in_flight(self, shards: int) -> None:
        if self._made:
            self._made["shards_in_flight"].set(shards)
