"""What the workers of test_launch.py run."""

import errno
import os
import signal
from pathlib import Path
from typing import Any

from distsbi import processes


def add(rank: processes.Rank, *, join_jax: bool, out: str, how: str) -> dict[str, Any]:
    """The sum over all devices, after the second of two has been lost once: killed, or by an error of its disk."""
    processes.join(rank, join_jax=join_jax)
    killed = Path(out) / "killed"
    if rank.index == 1 and not killed.exists():
        killed.touch()
        if how == "disk":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
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
        raise (ValueError if kind == "ValueError" else PermissionError)("the data are bad; mend them")
    processes.wait_for_all()


def who(rank: processes.Rank, *, join_jax: bool) -> processes.Rank:
    return rank
