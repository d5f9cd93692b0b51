"""How a process learns its rank, and how processes meet, disagree and end: without JAX, each a thread here."""

import builtins
import contextlib
import dataclasses
import json
import queue
import socket
import subprocess
import sys
import threading
import time
import zlib

import pytest

from distsbi.processes import Rank, agree_on, find_rank, in_step, job, meeting, wait_for_all
from distsbi.processes.given import first_host
from distsbi.processes.meeting import free_port, meet

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[007-009,12]",
}
MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
MPI_PORT = 61_440 + zlib.crc32(b"1531576320.0") % 4_096


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, None),
        (SLURM, Rank("gpu007:61447", 8, 5, 1)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "1(x8)"}, Rank("gpu007:61447", 8, 5)),  # all GPUs of its machine
        (SLURM | {"CUDA_VISIBLE_DEVICES": "3"}, Rank("gpu007:61447", 8, 5)),  # those that it sees
        (SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: value for name, value in SLURM.items() if "STEP" not in name}, None),  # the batch script itself
        (MPI, Rank(f"10.96.0.1:{MPI_PORT}", 4, 1, 1)),
        (SLURM | {"SLURM_STEP_ID": "1"}, Rank("gpu007:61968", 8, 5, 1)),
        (SLURM | MPI | {"SLURM_STEP_NUM_TASKS": "1"}, Rank(f"10.96.0.1:{MPI_PORT}", 4, 1, 1)),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1"}, Rank("t-0:8476", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        (
            SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            Rank("a:1", 2, 1),
        ),
    ],
)
def test_the_environment_says_the_rank(environment, rank):
    assert find_rank(environment=environment) == rank


def _own_address() -> str:
    """An address of this machine on a network, where it has one; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        with contextlib.suppress(OSError):
            probe.connect(("198.51.100.7", 9))
        return probe.getsockname()[0]


LOOPBACK = ("127.0.0.1", "127.1.2.3", "[::1]", "localhost")
ELSEWHERE = ("node1", "198.51.100.7", "0.0.0.0", "[2001:db8::7]", "[::]", "127.example.org")


@pytest.mark.parametrize("host", [*LOOPBACK, "own", *ELSEWHERE])
def test_who_is_let_in(host, monkeypatch):
    """At an address of this machine nobody by another one, neither where processes meet nor at JAX's service: by the loopback one nobody from
    elsewhere. A name, and an address that is translated on the way, is no such one."""
    import jax

    if host == "[::1]" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    one, loopback = host not in ELSEWHERE, host in LOOPBACK
    if host == "own" and (host := _own_address()) == "0.0.0.0":
        pytest.skip("this machine has no network")
    rank = Rank(f"{host}:{free_port()}", 2, 0)
    assert rank.loopback == loopback
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    with meeting._listening(rank) as server:
        bound = server.getsockname()[0]
    assert bound == (("127.0.0.1" if host == "localhost" else rank.host) if one else everywhere)
    given = {}
    for holder, name, value in (
        (job, "_meeting", None),
        (job, "_joined_jax", False),
        (job, "meet", lambda rank, timeout, lost: (None, f"{host}:1")),
        (job, "_notice_exit", lambda: None),
        (job.atexit, "register", lambda end: None),
        (jax.config, "update", lambda name, value: None),
        (jax.distributed, "initialize", lambda *arguments, **options: given.update(options)),
    ):
        monkeypatch.setattr(holder, name, value)
    job.join(rank)
    assert given["coordinator_bind_address"] == (f"{host}:1" if one else None)


def test_what_is_told_comes_before_the_environment():
    assert find_rank("[::1]:1234", 2, 1, environment=SLURM) == Rank("[::1]:1234", 2, 1)
    assert Rank("[::1]:1234", 2, 1).host == "::1"
    assert find_rank(detect=False, environment=SLURM) is None
    assert first_host("a[1-2]-ib,b") == "a1-ib"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("a:1", 2, 2), "process id 2 is out of range: the 2 processes are numbered from 0 to 1"),
        (("a:1", 2, -1), "out of range"),
        (("a:1", 0, 0), "at least 1"),
        (("a", 2, 0), "must be host:port"),
        (("a:99999", 2, 0), "must be host:port"),
        (("a:1", None, 0), "--num-processes missing"),
        ((None, None, 0), "--coordinator and --num-processes missing"),
    ],
)
def test_bad_ranks(given, says):
    with pytest.raises(ValueError, match=says):
        find_rank(*given, environment={})


def test_what_the_launcher_does_not_say():
    alone = {name: value for name, value in MPI.items() if "uri" not in name}
    five = alone | {"PMIX_SERVER_URI2": "prterun-a-7@0.1;tcp4://127.0.0.1:41231", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(ValueError, match="Open MPI does not say"):
        find_rank(environment=five)
    assert find_rank(environment=five | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"})
    pod = {"TPU_WORKER_HOSTNAMES": "t-0,t-1", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2"}
    with pytest.raises(ValueError, match="one of 2 TPU slices"):
        find_rank(environment=pod)


def test_open_mpi_on_ipv6():
    at = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp6://[2001:db8::1,fe80::1]:41011"}
    rank = find_rank(environment=MPI | at)
    assert rank is not None and rank.host == "2001:db8::1"
    five = {name: value for name, value in MPI.items() if "uri" not in name} | {
        "PMIX_SERVER_URI2": "prterun-a-7@0.1;tcp6://[::1]:41231"
    }
    with pytest.raises(ValueError, match="Open MPI does not say"):
        find_rank(environment=five | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"})


def test_jobs_of_open_mpi_do_not_share_a_port():
    uris = [f"{family << 16}.0;tcp://10.0.0.1:1" for family in range(100)]
    ranks = [find_rank(environment=MPI | {"OMPI_MCA_orte_hnp_uri": uri}) for uri in uris]
    assert len({rank.port for rank in ranks if rank}) > 90


def test_an_environment_that_says_half_of_it():
    with pytest.raises(ValueError, match="JAX_PROCESS_ID"):
        find_rank(environment={"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"})


@pytest.mark.parametrize("source", [SLURM, MPI, {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}])
def test_an_environment_without_its_numbers(source):
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "TPU_WORKER_ID"):
        if name in source:
            with pytest.raises(
                ValueError, match=f"variable {name} must be a whole number; got 'two': .*--num-processes"
            ):
                find_rank(environment=source | {name: "two"})
    jax = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "1"}
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES must be a whole number"):
        find_rank(environment=source | jax)


def _meet(*ranks: Rank, timeout: float = 20.0):
    """What each of them gets: a meeting, or the error; and a queue of what is said of lost ones."""
    found: list = [None] * len(ranks)
    lost: queue.Queue = queue.Queue()

    def one(number: int, rank: Rank) -> None:
        try:
            found[number] = meet(rank, timeout, lambda sentence, died: lost.put((rank.index, sentence, died)))
        except ValueError as error:
            found[number] = error

    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    return found, lost


def _places(count: int) -> list[Rank]:
    address = f"127.0.0.1:{free_port()}"
    return [Rank(address, count, index) for index in range(count)]


def test_they_meet_gather_and_leave():
    found, lost = _meet(*_places(3))
    meetings = [met for met, _ in found]
    assert len({address for _, address in found}) == 1
    gathered: list = [None] * 3

    def one(index: int) -> None:
        gathered[index] = [meetings[index].gather({"index": index, "round": n}) for n in range(3)]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert gathered == [[[{"index": i, "round": n} for i in range(3)] for n in range(3)]] * 3
    assert not meetings[0].leave(0.1)
    left: list = [None] * 3
    threads = [threading.Thread(target=lambda i=i: left.__setitem__(i, meetings[i].leave(20.0))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert left == [True] * 3
    for met in meetings:
        for line in met.lines.values():
            line.close()
    assert lost.empty()


@pytest.mark.parametrize("gone", [0, 2])
def test_all_hear_of_one_that_dies(gone):
    found, lost = _meet(*_places(3))
    found[gone][0]._over = True  # dead, it says nothing to the others
    for line in found[gone][0].lines.values():
        line.close()  # as the system does for a process that is killed
    heard = [lost.get(timeout=20) for _ in range(2)]
    assert {index for index, _, _ in heard} == {0, 1, 2} - {gone}
    for _, sentence, _ in heard:
        assert sentence.startswith(f"process {gone} on ")
        assert sentence.endswith(" died")


@pytest.mark.parametrize("failing", [0, 1])
def test_all_hear_why_one_fails(failing):
    found, lost = _meet(*_places(3))
    found[failing][0].fail("ValueError: no such file")
    heard = [lost.get(timeout=20) for _ in range(2)]
    assert {index for index, _, _ in heard} == {0, 1, 2} - {failing}
    for _, sentence, died in heard:
        assert sentence.startswith(f"process {failing} on ")
        assert sentence.endswith("failed: ValueError: no such file")
        assert not died


def test_they_disagree_on_their_number():
    first, second, _ = _places(3)
    found, _ = _meet(first, Rank(second.coordinator, 2, 1))
    for error in found:
        assert "the processes disagree on their number: process 0 on " in str(error)
        assert "as one of 3, process 1 on " in str(error)


def test_two_have_the_same_number():
    first, second, _ = _places(3)
    found, _ = _meet(first, second, second)
    assert all("two processes have the number 1" in str(error) for error in found)


def test_one_does_not_come():
    first, second, _ = _places(3)
    found, _ = _meet(first, second, timeout=1.0)
    assert all("2 of 3 processes came to " in str(error) and "without process 2" in str(error) for error in found)


def test_nobody_answers():
    (error,), _ = _meet(_places(2)[1], timeout=0.5)
    assert "process 1 cannot reach the coordinator at 127.0.0.1:" in str(error)
    (error,), _ = _meet(Rank("no-such-host.invalid:1", 2, 1), timeout=0.5)
    assert "cannot reach the coordinator at no-such-host.invalid:1" in str(error)


def test_the_port_is_in_use():
    with socket.create_server(("127.0.0.1", 0)) as other:
        (error,), _ = _meet(Rank(f"127.0.0.1:{other.getsockname()[1]}", 2, 0))
    assert "process 0 cannot listen at 127.0.0.1:" in str(error)
    assert "choose another port" in str(error)


def test_another_job_is_turned_away():
    first, second = _places(2)
    named = [dataclasses.replace(rank, job="a") for rank in (first, second)]
    found, _ = _meet(*named, dataclasses.replace(second, job="b"), timeout=5.0)
    # or it came when all had met
    assert "waits another job, and this process is none of it" in str(found[2]) or "cannot reach" in str(found[2])
    assert found[0][1] == found[1][1]


@pytest.mark.parametrize("count", [2, 3])
def test_a_stranger_is_not_told_the_name(count):
    """With which it would be let in; nor does it end the others."""
    ranks = [dataclasses.replace(rank, job="of 0123") for rank in _places(2)]
    led: queue.Queue = queue.Queue()
    threading.Thread(target=lambda: led.put(meet(ranks[0], 20.0, print))).start()
    with _when_listening((ranks[0].host, ranks[0].port)) as stranger:
        hello = {"hello": meeting.PROTOCOL, "index": 1, "count": count, "host": "h", "job": ""}
        stranger.sendall(json.dumps(hello).encode() + b"\n")
        said = stranger.makefile().readline()
    assert "refused" in said
    assert "0123" not in said
    met = meet(ranks[1], 20.0, print)[0], led.get(timeout=20)[0]
    for each in met:
        each.fail("the test is over")


def test_waiting_for_one_that_is_done():
    found, lost = _meet(*_places(2))
    leader, member = (met for met, _ in found)
    thread = threading.Thread(target=member.leave)
    thread.start()
    with pytest.raises(RuntimeError, match="process 1 on .* is done"):
        leader.gather(1)
    leader.fail("the test is over")
    thread.join(timeout=20)
    assert lost.get(timeout=20)[0] == 1
    found, lost = _meet(*_places(2))
    leader, member = (met for met, _ in found)
    threading.Thread(target=member.gather, args=(1,), daemon=True).start()
    assert not leader.leave(20.0)
    assert {"process 0 is done" in lost.get(timeout=20)[1] for _ in range(2)} == {True}


@pytest.mark.parametrize("gone", [0, 2])
def test_one_leaves_those_in_step(gone):
    """Who waits for its devices waits for no value; the others work alone as long as they like, and it waits."""
    found, lost = _meet(*_places(3))
    meetings = [met for met, _ in found]
    over = threading.Event()

    def work() -> None:
        with meetings[1].in_step():
            over.wait(30)

    working = threading.Thread(target=work, daemon=True)
    working.start()
    leaving = threading.Thread(target=meetings[gone].leave, daemon=True)
    leaving.start()
    heard = {index: sentence for index, sentence, _ in (lost.get(timeout=20) for _ in range(3))}
    leaving.join(timeout=20)
    assert not leaving.is_alive()
    assert set(heard) == {0, 1, 2}
    assert heard[1].startswith(f"process {gone} on ")
    for sentence in heard.values():
        assert f"process {gone} on {socket.gethostname()} is done, and process 1 on " in sentence
        assert "works with it: all processes must run the same lines" in sentence
    over.set()


@pytest.mark.parametrize("last", [0, 1])
def test_all_are_at_the_end_of_what_they_do_in_step(last):
    """The first there waits, and then all may leave as they like."""
    found, lost = _meet(*_places(2))
    meetings = [met for met, _ in found]
    slow, left = threading.Event(), queue.Queue()

    def one(index: int) -> None:
        with meetings[index].in_step():
            if index == last:
                slow.wait(20)
        left.put(index)
        left.put(meetings[index].leave(20.0))

    threads = [threading.Thread(target=one, args=(i,), daemon=True) for i in range(2)]
    for thread in threads:
        thread.start()
    with pytest.raises(queue.Empty):
        left.get(timeout=0.3)
    slow.set()
    assert sorted(left.get(timeout=20) for _ in range(4)) == [0, 1, True, True]
    assert lost.empty()


def test_one_has_left_before():
    """And leaves nothing to be in step with."""
    found, lost = _meet(*_places(2))
    leader, member = (met for met, _ in found)
    threading.Thread(target=member.leave, daemon=True).start()
    assert leader._byes[1].wait(20)
    assert lost.empty()
    with pytest.raises(RuntimeError, match="process 1 on .* is done"), leader.in_step():
        assert "process 1 on " in lost.get(timeout=20)[1]


@pytest.mark.parametrize(("module", "name"), [(sys, "exit"), (builtins, "exit"), (builtins, "quit")])
def test_what_is_given_to_exit_is_known(module, name, monkeypatch):
    class Fake:
        def leave(self) -> bool:
            raise AssertionError("it failed")

        def fail(self, reason: str) -> None:
            said.append(reason)

    said, code = [], []
    for attribute, value in (("_meeting", Fake()), ("_exit", code.append), ("_joined_jax", False), ("_exiting", None)):
        monkeypatch.setattr(job, attribute, value)
    monkeypatch.setattr(sys, "stdin", None)  # which exit and quit close
    monkeypatch.delattr(sys, "last_value", raising=False)
    real = getattr(module, name)
    job._notice_exit()
    try:
        with pytest.raises(SystemExit) as raised:
            getattr(module, name)(3)
    finally:
        job.end()
    assert raised.value.code == 3
    assert (said, code) == (["it called exit(3)"], [3])
    assert getattr(module, name) is real


ENDING = """
import sys, distsbi
distsbi.initialize("{address}", num_processes=2, process_id={index})
from distsbi import processes
processes.wait_for_all()
with processes.in_step():
    if {index}:
        {how}
    import time
    time.sleep(90)  # for a collective
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("1 / 0", "failed: ZeroDivisionError"),
        ("sys.exit(3)", "failed: it called exit(3)"),
        ("exit(3)", "failed: it called exit(3)"),
        ("raise SystemExit(3)", "is done, and process 0 on "),
        ("sys.exit(0)", "is done, and process 0 on "),
    ],
)
def test_a_script_that_ends_early_ends_the_other(how, says):
    """One that has not imported JAX itself."""
    address = f"127.0.0.1:{free_port()}"
    scripts = [ENDING.format(address=address, index=index, how=how) for index in (0, 1)]
    running = [
        subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True) for script in scripts
    ]
    said = [process.communicate(timeout=60)[1] for process in running]
    assert [process.returncode for process in running] == [
        1,
        3 if "exit(3)" in how.lower() and "raise" not in how else 1,
    ]
    assert f"process 1 on {socket.gethostname()} {says}" in said[0]


STRANGE = (
    b"GET / HTTP/1.1\r\n\r\n",
    b'{"hello": "distsbi 2"}\n',
    b'{"hello": "distsbi 1", "index": 1, "count": 2, "host": "h", "job": ""}\n',
    b'{"hello": "distsbi 2", "index": 7, "count": 2, "host": "h", "job": ""}\n',
    b'{"hello": "distsbi 2", "index": "1", "count": 2, "host": "h", "job": ""}\n',
)


def _when_listening(at):
    for _ in range(400):
        with contextlib.suppress(ConnectionRefusedError):
            return socket.create_connection(at, timeout=5)
        time.sleep(0.05)
    raise TimeoutError(at)


@pytest.mark.parametrize("said", STRANGE)
def test_strangers_are_turned_away(said):
    """And nobody waits for one that is silent."""
    ranks = _places(2)
    lost: queue.Queue = queue.Queue()
    thread = threading.Thread(target=lambda: lost.put(meet(ranks[0], 20.0, print)))
    thread.start()
    at = (ranks[0].host, ranks[0].port)
    with _when_listening(at) as stranger:
        stranger.sendall(said)
        assert meeting.PROTOCOL.encode() in stranger.recv(1000)
    silent = socket.create_connection(at, timeout=5)
    joined = meet(ranks[1], meeting.HELLO / 2, print)
    led = lost.get(timeout=20)
    assert joined[1] == led[1]
    silent.close()
    joined[0].fail("the test is over")
    led[0].fail("the test is over")


def test_one_process_agrees_with_itself():
    agree_on({"data": "a"}, "")
    wait_for_all()
    with in_step():
        pass
