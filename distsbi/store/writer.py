"""One writer per output folder.

Local disks: an exclusive lock on _distsbi/lock, which the system releases when the process ends, however it ends. Where
the file system has no locks (some network ones), two writers are not told apart.

Object stores have no locks: the writer keeps a lease, _distsbi/lease.json, and renews it every BEAT_SECONDS. Another one may
take a lease that was not renewed for STALE_SECONDS, or whose process is known to be gone; it writes its own name, waits SETTLE_SECONDS and
holds the lease if the name is still there. A writer that finds another's name, or could not renew its lease for STALE_SECONDS, stops.
This keeps two writers apart as long as requests take less than SETTLE_SECONDS and clocks differ by less than STALE_SECONDS; it is no proof
against a writer that was frozen for longer, which may write one shard more.

Two writers that meet all the same do no harm but double work: run.json lets only the same run go on in a folder, its
shards hold the same draws whoever makes them, and each is put whole.
"""

import contextlib
import dataclasses
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from distsbi.files import one_holder
from distsbi.store.layout import HIDDEN, Where
from distsbi.store.place import Place, as_place

BEAT_SECONDS, STALE_SECONDS, SETTLE_SECONDS = 10.0, 60.0, 2.0
_LEASE = {"token": str, "time": float, "who": str, "host": str, "pid": int}


@dataclasses.dataclass(frozen=True)
class Clock:
    """Seconds since 1970, seconds that this process saw pass, and a wait."""

    date: Callable[[], float] = time.time
    passed: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep


CLOCK = Clock()


class Writer:
    """The right to write in a folder, kept by a thread that gives signs of life. `token`: of its lease, which was put just now."""

    def __init__(self, out: Place, token: str, clock: Clock = CLOCK):
        self._out, self._token, self._clock = out, token, clock
        self._renewed, self._lost = clock.passed(), ""
        self._end, self._one = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._keep, daemon=True, name="distsbi-writer")
        self._thread.start()

    def check(self) -> None:
        """Raises RuntimeError if another process holds the folder now, or may: the lease ran out and cannot be renewed."""
        if self._run_out():
            self._renew()
        if self._lost:
            raise RuntimeError(
                f"{self._out} was taken over by {self._lost}; this call ends, and what is finished stays. Give the same call "
                "again when the other has ended."
            )

    def close(self) -> None:
        self._end.set()
        self._thread.join()

    def _keep(self) -> None:
        while not self._lost and not self._end.wait(BEAT_SECONDS):
            self._renew()

    def _run_out(self) -> bool:
        return not self._out.local and self._clock.passed() - self._renewed > STALE_SECONDS

    def _renew(self) -> None:
        with self._one:
            now = self._clock.passed()
            try:
                if self._out.local:
                    os.utime(_lock(self._out))
                else:
                    found = read_lease(self._out)
                    if found and found["token"] != self._token:
                        self._lost = found["who"]
                        return
                    _put_lease(self._out, self._token, self._clock)
                self._renewed = now
            except Exception:  # fsspec's stores raise errors of their own
                if self._run_out():
                    self._lost = "nobody that is known (the store did not answer, and the lease ran out)"


@contextlib.contextmanager
def one_writer(out: Where, *, clock: Clock = CLOCK) -> Iterator[Writer]:
    """Holds the folder for the time of the block. Raises ValueError naming the writer that holds it."""
    place = as_place(out)
    with _locked(place) if place.local else _leased(place, clock) as token:
        writer = Writer(place, token, clock)
        try:
            yield writer
        finally:
            writer.close()


def last_sign(out: Where) -> tuple[float, str] | None:
    """When the folder's writer last gave a sign of life (seconds since 1970), and who it is. None: nobody writes.

    Only reads. A writer that was killed on another machine is seen for STALE_SECONDS more.
    """
    place = as_place(out)
    if not place.local:
        found = read_lease(place)
        return (found["time"], found["who"]) if found and _fresh(found, time.time()) else None
    try:
        when, who = os.stat(_lock(place)).st_mtime, _lock(place).read_text().strip()
    except FileNotFoundError:
        return None
    name = re.fullmatch(r"process (\d+) on (.*)", who)
    gone = name is not None and name[2] == socket.gethostname() and not _alive(int(name[1]))
    return (when, who) if who and not gone and time.time() - when < STALE_SECONDS else None


def read_lease(out: Place) -> dict[str, Any] | None:
    """The lease in an object store; None if there is none."""
    try:
        found = json.loads((out / HIDDEN / "lease.json").read())
        return {name: kind(found[name]) for name, kind in _LEASE.items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):  # of something else, or from the future
        return {"token": "", "time": 0.0, "who": "another program", "host": "", "pid": 0}


@contextlib.contextmanager
def _locked(out: Place) -> Iterator[str]:
    with one_holder(_lock(out), str(out)):
        yield ""


@contextlib.contextmanager
def _leased(out: Place, clock: Clock) -> Iterator[str]:
    found, now = read_lease(out), clock.date()
    if found and _fresh(found, now):
        raise _taken(out, f"{found['who']} (last sign of life {now - found['time']:.0f} s ago)")
    token = uuid.uuid4().hex
    _put_lease(out, token, clock)
    clock.sleep(SETTLE_SECONDS)
    found = read_lease(out)
    if found is None or found["token"] != token:
        raise _taken(out, found["who"] if found else "another process")
    try:
        yield token
    finally:
        with contextlib.suppress(Exception):  # it runs out by itself
            found = read_lease(out)
            if found and found["token"] == token:
                (out / HIDDEN / "lease.json").remove()


def _put_lease(out: Place, token: str, clock: Clock = CLOCK) -> None:
    lease = {"token": token, "time": clock.date(), "who": _me(), "host": socket.gethostname(), "pid": os.getpid()}
    (out / HIDDEN / "lease.json").write(json.dumps(lease).encode(), alone=False)


def _fresh(lease: dict[str, Any], now: float) -> bool:
    """Whether its process may be alive. `now`: seconds since 1970."""
    if now - lease["time"] > STALE_SECONDS:
        return False
    return lease["host"] != socket.gethostname() or _alive(lease["pid"])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return True


def _lock(out: Place) -> Path:
    return Path(out.path) / HIDDEN / "lock"


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _taken(out: Place, who: str) -> ValueError:
    return ValueError(f"{out} is being written by {who}; wait, or use another folder.")
