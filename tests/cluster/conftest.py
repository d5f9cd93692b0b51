import subprocess
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.cluster.nodes import environment

CONFIG = """\
strategy: {model: mlp}
data: {task: two_moons}
model: {width: 16, depth: 1, embed_depth: 1}
training: {nsteps: 20, calibrate: false}
"""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """What an operator has at /data before a catalog: a run, trained on the command line, and a catalog of two rows."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "train.yaml").write_text(CONFIG)
    command = "distsbi train --config train.yaml --out runs/main"
    env = environment(JAX_PLATFORMS="cpu")
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (2, 2)).astype("float32")
    pq.write_table(pa.table({"id": ["g0", "g1"], "x": list(x)}), folder / "catalog.parquet")
    return folder


def read(out: Path) -> dict[str, np.ndarray]:
    """Draws by id."""
    from distsbi import open_catalog

    catalog = open_catalog(out)
    assert catalog.status().left == 0
    return {name: np.asarray(catalog.draws(name)) for name in ("g0", "g1")}
