"""This process as one of several: joining, agreeing, waiting, ending together.

Without `initialize` there is one process, and all of this is trivial. Where somebody else has called `jax.distributed.initialize`, the processes
are JAX's, and host values go through `multihost_utils`.
"""

import atexit
import builtins
import contextlib
import functools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from distsbi.processes.given import Rank, find_rank
from distsbi.processes.meeting import Meeting, interface, meet

LOST = 1  # exit code of a process that ends because another did
GRACE = 2.0  # seconds for this process to tell the error that another failed with too
ADVICE = "start all processes again with the same command: what is finished is kept"

_meeting: Meeting | None = None
_joined_jax = False
_exiting: Any = None  # what was given to exit, which leaves no other trace
_EXITS = {
    (module, name): getattr(module, name)
    for module, name in ((sys, "exit"), (builtins, "exit"), (builtins, "quit"))
    if hasattr(module, name)
}


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: float = 300.0,
    detect: bool = True,
    join_jax: bool = True,
) -> bool:
    """Joins this process to the others of its job. Call it before anything else touches JAX; True if there are several processes.

    Without arguments the environment says who this is (SLURM, Open MPI, a TPU pod of GKE, JAX's own variables); where it says nothing, or a
    single process, nothing happens. A process that ends early, killed or by an error, ends all others: with a sentence and exit code 1, or, if
    XLA notices first, by XLA's own abort, which cannot be caught (its client calls LOG(FATAL)). Its exit code is known if it ends by an error or by
    `sys.exit`, `exit` or `quit`. `raise SystemExit(3)` leaves no trace, and is the script's end: that, too, ends the others where they train with it
    or wait for its values, but not where they wait in computations of your own over the devices of all: put those into `processes.in_step()`.

    Args:
        coordinator: "host:port" of process 0's machine, with a free port. Where the host is an IP address of that machine, it listens there alone: on
            the loopback interface only this machine is let in. For a name it listens on all interfaces.
        num_processes, process_id: how many there are, and this one's number from 0 on.
        timeout: seconds to wait for the others.
        detect: look at the environment where nothing is given.
        join_jax: False where somebody else (Ray Train) has called `jax.distributed.initialize`.

    Raises ValueError if processes are missing after `timeout`, disagree on their number or cannot reach each other, RuntimeError (of
    JAX) if it has started already.

    Example:
        `distsbi.initialize("node1:1234", num_processes=2, process_id=0)`
    """
    rank = find_rank(coordinator, num_processes, process_id, detect=detect)
    return rank is not None and join(rank, timeout=timeout, join_jax=join_jax)


def join(rank: Rank, *, timeout: float = 300.0, join_jax: bool = True) -> bool:
    """`initialize`, for a rank that is known."""
    global _meeting, _joined_jax
    if _meeting is not None:
        raise RuntimeError("distsbi.initialize was called before in this process; call it once.")
    if rank.count == 1:
        return False
    import jax

    meeting, address = meet(rank, timeout, _lost)
    _meeting = meeting
    _notice_exit()
    atexit.register(end)  # after the import: JAX's own handler, which waits for the others, must not come first
    if join_jax:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_enable_preemption_service", False)  # it would keep SIGTERM from ending the process
        jax.distributed.initialize(
            address,
            rank.count,
            rank.index,
            local_device_ids=rank.local,
            initialization_timeout=int(timeout) + 1,
            cluster_detection_method="deactivate",
            coordinator_bind_address=address if interface(rank) else None,  # None: all interfaces
        )
        _joined_jax = True
    return True


def count() -> int:
    """How many processes there are."""
    if _meeting is not None:
        return _meeting.rank.count
    import jax

    return jax.process_count()


def index() -> int:
    """This process' number, from 0 on."""
    if _meeting is not None:
        return _meeting.rank.index
    import jax

    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes what is written once."""
    return index() == 0


def gather(value: Any) -> list[Any]:
    """Everyone's `value`, a JSON-able one, by process. All processes must call it."""
    global _exiting
    _exiting = None  # somebody caught it
    if _meeting is not None:
        return _meeting.gather(value)
    if count() == 1:
        return [value]
    import numpy as np
    from jax.experimental import multihost_utils

    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(np.max(multihost_utils.process_allgather(np.int32(len(text)))))
    padded = np.full(size, ord(" "), np.uint8)
    padded[: len(text)] = text
    return [json.loads(row.tobytes()) for row in np.asarray(multihost_utils.process_allgather(padded))]


def wait_for_all() -> None:
    """Returns when all processes have come here."""
    gather(None)


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """A block, or as a decorator a function, in which all processes work together: if one leaves before all are at its end, the others end with a
    sentence rather than wait for its devices. All processes must enter it."""
    with contextlib.nullcontext() if _meeting is None else _meeting.in_step():
        yield


def agree_on(what: dict[str, Any], advice: str) -> None:
    """Raises ValueError, in every process, unless each has the same `what`, JSON-able values by name: they must do the same thing."""
    for other, found in enumerate(gather(what)):
        differing = sorted(
            name for name in {*what, *found} if json.dumps(what.get(name)) != json.dumps(found.get(name))
        )
        if differing:
            raise ValueError(f"processes {index()} and {other} differ in {', '.join(differing)}; {advice}.")


def end(failed: str | None = None, code: int = LOST) -> None:
    """Leaves the others, when all have come here; or at once, where this process fails: the others end with the reason, and this one with
    `code`. Nothing where there are none. At the end of a script it happens by itself."""
    global _joined_jax
    if _meeting is None:
        return
    for (module, name), real in _EXITS.items():
        setattr(module, name, real)
    error = getattr(sys, "last_value", None)  # what ended the interpreter
    if failed is None and isinstance(error, BaseException):
        failed = f"{type(error).__name__}: {error}".rstrip(": ")
    elif failed is None and _exiting not in (None, 0):
        failed = f"it called exit({_exiting!r})"
        code = _exiting if isinstance(_exiting, int) else code
    try:
        left = failed is None and _meeting.leave()
    except KeyboardInterrupt:
        left, failed = False, "it was interrupted while it waited for the others"
    if not left:
        _meeting.fail(failed or "another process ended early")
        _exit(code)  # without XLA's barrier, at which the others do not arrive
    if _joined_jax:
        import jax

        _joined_jax = False
        jax.distributed.shutdown()


def _notice_exit() -> None:
    """Keeps what is given to `sys.exit`, `exit` and `quit`: the interpreter tells its exit handlers of errors, but not of SystemExit."""

    def noticed(real: Callable[[Any], NoReturn]) -> Callable[..., NoReturn]:
        @functools.wraps(real)
        def leave(code: Any = None) -> NoReturn:
            global _exiting
            if threading.current_thread() is threading.main_thread():
                _exiting = code
            real(code)

        return leave

    for (module, name), real in _EXITS.items():
        setattr(module, name, noticed(real))


def _lost(sentence: str, died: bool) -> None:
    """Another process has ended early. The main thread may hang in a collective with it, from which nothing but the end of the process helps."""
    if not died:
        time.sleep(GRACE)
    print(f"Failed: {sentence}, and this process ends too{f'; {ADVICE}.' if died else '.'}", file=sys.stderr)
    _exit(LOST)


def _exit(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
