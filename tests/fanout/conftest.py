import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi.fanout import catalog as catalog_module

sys.path.insert(0, str(Path(__file__).parent))  # for fake_posterior, here and (by way of sys.path) in workers
from fake_posterior import make_run

ROWS = 40


@pytest.fixture(autouse=True)
def fake_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are fake unless a test says otherwise."""
    monkeypatch.setattr(catalog_module, "LOADER", "fake_posterior:load")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run")


@pytest.fixture
def make_catalog(tmp_path: Path) -> Callable[..., Path]:
    """A Parquet catalog of ids "g0", "g1", ...; `switches`: row -> x[0], `rows`: row -> x."""

    def make(n: int = ROWS, switches: dict[int, float] | None = None, rows: dict[int, Any] | None = None) -> Path:
        x: list[Any] = np.random.default_rng(0).normal(size=(n, 3)).tolist()
        for row, value in (switches or {}).items():
            x[row][0] = value
        for row, value in (rows or {}).items():
            x[row] = value
        path = tmp_path / "catalog.parquet"
        pq.write_table(
            pa.table({"id": [f"g{i}" for i in range(n)], "x": pa.array(x, pa.list_(pa.float64()))}),
            path,
            row_group_size=7,
        )
        return path

    return make


@pytest.fixture(scope="package")
def local_ray() -> Iterator[None]:
    """One Ray for the tests of this folder: they find it running and leave it running."""
    from distsbi.fanout.cluster import connected

    with connected("local", 3, 1, 0):
        yield
