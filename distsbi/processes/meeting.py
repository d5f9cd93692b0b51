"""How processes meet before JAX joins them, and how they end together.

Process 0 listens at the coordinator's address; the others connect and say who they are. What does not fit is refused in a sentence to all of
them: XLA's own coordination service ends a process by abort, or lets it wait, where a number is wrong or a port in use. The connections stay.
They carry a few host values (`gather`), and a process that ends closes its own: the others know at once, although their main threads hang
in a collective with the dead one, and end too. A process that has left and stays, since others still work, is told to all: those that are in step
with it end. A machine that vanishes without a word is noticed by keep-alive within a minute or so.

    member -> leader    {"hello": ...}   {"value": ...}          {"bye": 1} or {"failed": why}
    leader -> member    {"go": ...}      {"values": [...]}       {"bye": 1} or {"failed": why}, or {"refused": why}
                                         {"left": index}, of one that has said good-bye
"""

import contextlib
import ipaddress
import json
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from distsbi.processes.given import Rank

PROTOCOL = "distsbi 2"
RETRY = 0.2  # seconds between attempts to connect
HELLO = 10.0  # seconds for who connected to say hello
HEARD = 2.0  # seconds for the others to end first
LINE = 2**26  # bytes, most
LEFT = object()  # in the place of a value of a process that has said good-bye
OTHER = "give --coordinator with a port of its own, --num-processes and --process-id to each process of one of them"
ALIKE = "all processes must run the same lines to the end (one that gives up says so by sys.exit(1) or an error; raise SystemExit(1) is not heard)"


class Line:
    """A connection that carries JSON, a line for each message."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.file = connection.makefile("rb")
        self.lock = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # keep-alive is for a connection at rest; TCP_USER_TIMEOUT, in ms, for one with data that nobody acknowledges
        options = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 60_000}
        for name, value in options.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """A peer that is gone is the reader's to notice."""
        with contextlib.suppress(OSError), self.lock:
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> dict[str, Any] | None:
        """The next message; None where there will be no more."""
        try:
            message = json.loads(self.file.readline(LINE))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def turn_away(self, sentence: str) -> None:
        """Says why, and closes."""
        self.send({"refused": sentence})
        self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


class Meeting:
    """The processes that have met, seen from one of them. `lost(sentence, died)` is called in a thread of its own when another ends early."""

    def __init__(self, rank: Rank, lines: dict[int, Line], hosts: dict[int, str], lost: Callable[[str, bool], None]):
        self.rank, self.lines, self.hosts = rank, lines, hosts
        self._lost, self._over, self._leaving, self._early = lost, False, False, False
        self._in_step = False
        self._left: int | None = None  # the first that has said good-bye
        self._byes = {index: threading.Event() for index in lines}
        self._values: dict[int, queue.Queue[Any]] = {index: queue.Queue() for index in lines}
        self._readers = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in lines]
        for reader in self._readers:
            reader.start()

    def gather(self, value: Any) -> list[Any]:
        """Everyone's `value` (JSON), by process; returns when all have given theirs. Raises RuntimeError if one has left."""
        if self.rank.index:
            self.lines[0].send({"value": value})
            return self._values[0].get()
        values = [value]
        for i in range(1, self.rank.count):
            said = self._values[i].get()
            if said is LEFT:
                self._values[i].put(LEFT)
                raise RuntimeError(f"{self._name(i)} is done, and process 0 waits for it: {ALIKE}")
            values.append(said)
        for line in self.lines.values():
            line.send({"values": values})
        return values

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """A block in which all work together and wait for each other without a word here: if one leaves before all are at its end, the others end."""
        before, self._in_step = self._in_step, True
        self._check_left()
        try:
            yield
        finally:
            self._in_step = before
        self.gather(None)

    def leave(self, timeout: float | None = None) -> bool:
        """Says good-bye and waits for everyone else's, process 0 with its own until it has all others'; False if another ends early, or one is
        missing after `timeout` seconds. Without it as long as the others work: the end of a connection is noticed."""
        deadline = None if timeout is None else time.monotonic() + timeout
        self._leaving = True
        for index, values in self._values.items():
            if not self.rank.index and not values.empty() and not self._byes[index].is_set():
                self._waits_in_vain(index)
        for line in self.lines.values():
            line.send({"bye": 1} if self.rank.index else {"left": 0})
        for bye in self._byes.values():
            if not bye.wait(None if deadline is None else max(deadline - time.monotonic(), 0.0)):
                return False
        if self._early:
            return False
        self._over = True
        for line in self.lines.values() if not self.rank.index else ():
            line.send({"bye": 1})
        return True

    def fail(self, reason: str) -> None:
        """Says why this process ends, which ends the others; waits a moment for them to have heard it."""
        if self._over:
            return
        self._over = True
        for line in self.lines.values():
            line.send({"failed": reason})
        deadline = time.monotonic() + HEARD
        for reader in self._readers:
            reader.join(max(deadline - time.monotonic(), 0.0))
        for line in self.lines.values():
            line.close()

    def _read(self, index: int) -> None:
        while True:
            message = self.lines[index].receive()
            if message is None:
                self._end(f"{self._name(index)} died", index, died=True)
            elif "failed" in message:
                said = message["failed"]
                self._end(
                    said if index == 0 and said.startswith("process ") else f"{self._name(index)} failed: {said}",
                    index,
                    died=False,
                )
            elif "value" in message or "values" in message:
                self._values[index].put(message.get("values", message.get("value")))
                if self._leaving and not self.rank.index:
                    self._waits_in_vain(index)
                continue
            elif "bye" in message:  # process 0's is the last word; of another the end is still to be noticed
                self._over = self._over or index == 0
                if index:
                    self._note_left(index)
                self._byes[index].set()
                self._values[index].put(LEFT)
                continue
            elif "left" in message:
                self._note_left(message["left"])
                continue
            return

    def _note_left(self, index: int) -> None:
        if self._left is not None:
            return
        self._left = index
        for other, line in self.lines.items() if not self.rank.index else ():
            if other != index:
                line.send({"left": index})
        self._check_left()

    def _check_left(self) -> None:
        if self._in_step and self._left is not None:
            one, other = self._name(self._left), self._name(self.rank.index)
            self._end(f"{one} is done, and {other} works with it: {ALIKE}", -1, died=False)

    def _waits_in_vain(self, index: int) -> None:
        self._end(f"process 0 is done, and {self._name(index)} waits for it: {ALIKE}", -1, died=False)

    def _end(self, sentence: str, index: int, died: bool) -> None:
        if self._over:
            return
        self._over = self._early = True
        for other, line in self.lines.items():
            if other != index:
                line.send({"failed": sentence})
        self._lost(sentence, died)
        for bye in self._byes.values():
            bye.set()

    def _name(self, index: int) -> str:
        return f"process {index} on {self.hosts.get(index, '?')}"


def meet(rank: Rank, timeout: float, lost: Callable[[str, bool], None]) -> tuple[Meeting, str]:
    """(the meeting, an address for JAX's coordination service), when all processes have come.

    Raises ValueError where the port is in use, nothing answers at the coordinator's address, processes are missing after `timeout` seconds, or they
    disagree on their number or their own numbers: in all of them.
    """
    deadline = time.monotonic() + timeout
    return _lead(rank, deadline, timeout, lost) if rank.index == 0 else _join(rank, deadline, timeout, lost)


def _lead(rank: Rank, deadline: float, timeout: float, lost: Callable[[str, bool], None]) -> tuple[Meeting, str]:
    lines: dict[int, Line] = {}
    hosts = {0: socket.gethostname()}

    def refuse(sentence: str, *more: Line) -> ValueError:
        for line in (*lines.values(), *more):
            line.send({"refused": sentence})
        return ValueError(sentence)

    come: queue.Queue[tuple[Line, dict[str, Any]]] = queue.Queue()
    with _listening(rank) as server, _receiving(server, come):
        while len(lines) < rank.count - 1:
            try:
                line, hello = come.get(timeout=max(deadline - time.monotonic(), 0.01))
            except queue.Empty:
                missing = ", ".join(str(i) for i in range(1, rank.count) if i not in lines)
                raise refuse(
                    f"{len(lines) + 1} of {rank.count} processes came to {rank.coordinator} within {timeout:g} s, without process {missing}; "
                    f"start all of them, each with the same --coordinator and --num-processes."
                ) from None
            if (
                hello["job"] != rank.job
            ):  # of another job, which met this one at its port; this one's name would let it in
                line.turn_away(f"at {rank.coordinator} waits another job, and this process is none of it: {OTHER}.")
                continue
            index, count, host = hello["index"], hello["count"], hello["host"]
            if count != rank.count:
                raise refuse(
                    f"the processes disagree on their number: process 0 on {hosts[0]} was started as one of {rank.count}, process {index} on "
                    f"{host} as one of {count}; give all of them the same --num-processes.",
                    line,
                )
            if index in hosts:
                raise refuse(
                    f"two processes have the number {index}, on {hosts[index]} and on {host}; give each its own --process-id, from 0 to {count - 1}.",
                    line,
                )
            lines[index], hosts[index] = line, host
    address = f"{rank.coordinator.rpartition(':')[0]}:{free_port()}"
    for line in lines.values():
        line.send({"go": address, "hosts": {str(i): host for i, host in hosts.items()}})
    return Meeting(rank, lines, hosts, lost), address


@contextlib.contextmanager
def _receiving(server: socket.socket, come: "queue.Queue[tuple[Line, dict[str, Any]]]") -> Iterator[None]:
    """Meanwhile, who connects and says hello is handed over; nobody waits for one that is silent."""
    over = threading.Event()

    def greet(connection: socket.socket) -> None:
        connection.settimeout(HELLO)
        line = Line(connection)
        hello = line.receive()
        if hello is None or not _is_hello(hello):  # a stranger, or another version
            line.turn_away(f"this is {PROTOCOL}; use the same version of distsbi in all processes.")
        elif over.is_set():
            line.close()  # it tries again
        else:
            connection.settimeout(None)
            come.put((line, hello))

    def accept() -> None:
        server.settimeout(RETRY)
        while not over.is_set():
            with contextlib.suppress(OSError):  # nobody came, or went at once
                threading.Thread(target=greet, args=(server.accept()[0],), daemon=True).start()

    accepting = threading.Thread(target=accept, daemon=True)
    accepting.start()
    try:
        yield
    finally:
        over.set()
        accepting.join()
        with contextlib.suppress(queue.Empty):
            while True:
                come.get_nowait()[0].close()


def _is_hello(said: dict[str, Any]) -> bool:
    index, count = said.get("index"), said.get("count")
    return (
        said.get("hello") == PROTOCOL
        and type(index) is int
        and type(count) is int
        and 0 <= index < count
        and all(isinstance(said.get(name), str) for name in ("host", "job"))
    )


def _join(rank: Rank, deadline: float, timeout: float, lost: Callable[[str, bool], None]) -> tuple[Meeting, str]:
    while True:
        try:
            connection = socket.create_connection(
                (rank.host, rank.port), timeout=max(deadline - time.monotonic(), 0.01)
            )
            connection.settimeout(max(deadline - time.monotonic(), 0.01) + HELLO)  # process 0 says whom it waited for
            line = Line(connection)
            hello = {"index": rank.index, "count": rank.count, "host": socket.gethostname(), "job": rank.job}
            line.send({"hello": PROTOCOL, **hello})
            answer = line.receive()
            if answer is not None:
                break
            line.close()  # process 0 ended, or is about to be started again
            reason = "the connection was closed"
        except OSError as error:  # names may not be known yet, too
            reason = str(error)
        if time.monotonic() + RETRY > deadline:
            raise ValueError(
                f"process {rank.index} cannot reach the coordinator at {rank.coordinator} within {timeout:g} s ({reason}): start process 0 on that "
                f"machine, and check the address and what closes ports between the machines."
            )
        time.sleep(RETRY)
    connection.settimeout(None)
    if "go" not in answer:
        raise ValueError(
            answer.get("refused", f"{rank.coordinator} is no coordinator of distsbi; give the address of process 0.")
        )
    return Meeting(rank, {0: line}, {int(i): host for i, host in answer["hosts"].items()}, lost), answer["go"]


def _listening(rank: Rank) -> socket.socket:
    """Where the coordinator's address is: at that alone, or on all interfaces."""
    where = interface(rank)
    both = where is None and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both or ":" in rank.host else socket.AF_INET
    try:
        return socket.create_server((where or "", rank.port), family=family, dualstack_ipv6=both, backlog=rank.count)
    except OSError as error:
        raise ValueError(
            f"process 0 cannot listen at {rank.coordinator} ({error.strerror or error}): choose another port for all processes, or end what uses "
            f"it; the address must be one of process 0's own machine."
        ) from error


def interface(rank: Rank) -> str | None:
    """The host of process 0 where to listen there is enough: on the loopback interface, or at an IP address of this machine. None: all interfaces,
    for an address that is translated on the way, and a name, which may be another address to the others (its own name is often 127.0.1.1)."""
    if rank.loopback:
        return rank.host
    try:
        address = ipaddress.ip_address(rank.host)
        with socket.socket(socket.AF_INET6 if address.version == 6 else socket.AF_INET) as probe:
            probe.bind((rank.host, 0))
    except (OSError, ValueError):
        return None
    return None if address.is_unspecified else rank.host


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
