"""Whose fault an error at a row is: the row's, which is recorded as failed, or the machine's, and then its shard is tried again elsewhere."""

import errno
import socket

from distsbi.fanout.agenda import one_line

EXHAUSTED = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOMEM,
    errno.EMFILE,
    errno.ENFILE,
    errno.EIO,
}  # disk, memory, open files


def machines_fault(error: BaseException) -> str | None:
    """What to raise as a MachinesFault in place of an error that came of memory, a disk or a device; None: it is the row's.

    In its place, for an OSError of a disk that is full would be taken for the output folder's. What a callback raised JAX tells as it tells a
    device's trouble, also that a solver did not converge (equinox's `error_if`): that is the row's.
    """
    from jax.errors import JaxRuntimeError

    if isinstance(error, JaxRuntimeError):
        machines = "callback" not in str(error).lower()
    else:
        machines = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in EXHAUSTED)
    if not machines:
        return None
    return f"{one_line(error)[:120]} on {socket.gethostname()}, the machine's fault and not the row's: make room there"
