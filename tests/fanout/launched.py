"""What the workers of test_launch.py run."""

import os
import signal
from pathlib import Path
from typing import Any

from distsbi import processes


def add(rank: processes.Rank, *, join_jax: bool, out: str) -> dict[str, Any]:
    """The sum over all devices, after the second of two has been killed once."""
    processes.join(rank, join_jax=join_jax)
    killed = Path(out) / "killed"
    if rank.index == 1 and not killed.exists():
        killed.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    import jax
    import numpy as np

    from distsbi import mesh as meshes

    mesh = meshes.make_mesh(shared=True)
    numbers = meshes.put(np.arange(mesh.size, dtype=np.float32), meshes.batch_sharding(mesh))
    total = float(jax.jit(lambda a: a.sum(), out_shardings=meshes.replicated(mesh))(numbers))
    processes.end()
    return {"total": total, "processes": jax.process_count(), "platform": jax.default_backend()}


def fail(rank: processes.Rank, *, join_jax: bool, which: int, kind: str) -> None:
    processes.join(rank, join_jax=join_jax)
    if rank.index == which:
        raise (ValueError if kind == "ValueError" else OSError)("the data are bad; mend them")
    processes.wait_for_all()
