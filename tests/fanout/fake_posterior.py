"""A posterior in closed form with faults on demand: fast enough to test everything around it.

    theta | x ~ N(x[:dim_theta], 1), noise from (seed, observation id, draw index)

x[0] is the switch: RAISE raises, DEVICE raises as a device out of memory does, KILL and ABORT kill the process, SLEEP hangs,
KILL_ONCE and SLEEP_ONCE do so only the first time. `bad_starts`: so many workers that replace a killed one fail to load;
`kill_at_rename`: the first worker that has written a shard dies before it gives it its name.
"""

import hashlib
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from distsbi import files, sampling
from distsbi.data.standardise import Standardizer
from distsbi.mesh import make_mesh
from distsbi.methods import make_method
from distsbi.networks import Layout
from distsbi.sampling import Tile
from distsbi.solvers import make_solver

RAISE, KILL, KILL_ONCE, SLEEP_ONCE, DEVICE, ABORT, SLEEP = 1001.0, 1002.0, 1003.0, 1004.0, 1005.0, 1006.0, 1007.0


class FakePosterior:
    def __init__(self, run: Path):
        self.run = run
        config = json.loads((run / "fake.json").read_text())
        self.dim_theta, self.ch_theta, self.dim_x, self.ch_x = 2, 1, 3, 1
        self.parameter_names, self.missing = ("a", "b"), config.get("missing", False)
        self.fingerprint = config.get("fingerprint", "f00d")
        self.seconds_per_row = config.get("seconds_per_row", 0.0)
        self.method = make_method("flow")
        self.default_solver = make_solver(self.method)
        self.tile, self.most_slots = Tile(2, 4), 1_000
        self.mesh = make_mesh({"data": 1})
        self.scales = Standardizer.identity(self.dim_theta, self.dim_x)
        self.layout, self.is_unconditional = Layout.of(self.dim_x), False
        self.central_x = np.zeros((self.dim_x, self.ch_x), np.float32)
        self.calls: list[int] = []  # rows of each call of draw
        if config.get("kill_at_rename") and not (run / "killed").exists():  # never in the process of the tests
            replace = os.replace

            def rename(source: Any, target: Any) -> None:
                if Path(target).name.startswith("shard-") and self._first("killed"):
                    os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            files.os = type("os", (), {**vars(os), "replace": staticmethod(rename)})  # type: ignore[attr-defined]
        if (run / "killed").exists() and any(self._first(f"start-{i}") for i in range(config.get("bad_starts", 0))):
            raise OSError("the disk is away")

    def far(self, xs: np.ndarray) -> dict[int, str]:
        return {}

    def check_x(self, x: np.ndarray) -> np.ndarray:
        if x.shape != (3, 1):
            raise ValueError(f"x must have shape (3, 1); got {x.shape}")
        if not np.isfinite(x).all():
            raise ValueError("x has values that are NaN or infinite")
        return x

    def draw(
        self, key: Any, xs: np.ndarray, nsamples: int, *, observation_ids: np.ndarray, **options: Any
    ) -> np.ndarray:
        self.calls.append(len(xs))
        return np.stack([self._row(key, x, nsamples, int(i)) for x, i in zip(xs, observation_ids, strict=True)])

    def _row(self, key: Any, x: np.ndarray, nsamples: int, observation_id: int) -> np.ndarray:
        switch = float(x[0, 0])
        if switch == RAISE:
            raise RuntimeError("the solver did not converge")
        if switch == DEVICE:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        if switch == KILL or (switch == KILL_ONCE and self._first("killed")):
            os.kill(os.getpid(), signal.SIGKILL)
        if switch == ABORT:
            os.abort()
        if switch == SLEEP or (switch == SLEEP_ONCE and self._first("slept")):
            time.sleep(120)
        time.sleep(self.seconds_per_row)
        words = np.asarray(jax.random.key_data(key)).astype(np.uint64)
        bits = np.random.Philox(key=np.asarray([(words[0] << np.uint64(32)) | words[1], observation_id], np.uint64))
        noise = np.random.Generator(bits).standard_normal((nsamples, self.dim_theta), np.float32)
        return (x[: self.dim_theta, 0] + noise)[:, :, None]

    def _first(self, what: str) -> bool:
        try:
            (self.run / what).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def load(run: str) -> FakePosterior:
    return FakePosterior(Path(run))


def load_on_one_device(run: str) -> Any:
    """A posterior of distsbi, for which few programs are compiled."""
    return sampling.load(run, mesh={"data": 1})


def make_run(path: Path, **config: Any) -> Path:
    path.mkdir()
    (path / "fake.json").write_text(json.dumps(config))
    return path


def draws_hash(out: Path) -> str:
    """SHA-256 of ids and decoded draws of all good rows, by id: through plain pyarrow."""
    table = pq.read_table(out).filter(pc.field("status") == "ok").sort_by("id").combine_chunks()
    digest = hashlib.sha256("".join(map(str, table["id"].to_pylist())).encode())
    digest.update(table["draws"].chunk(0).storage.flatten().to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()
