"""Machines that come, leave and die during a catalog: a Ray cluster of several nodes on this one, a driver of its own, real signals.

The whole campaign is benchmarks/faults.py.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_posterior import KILL_ONCE, draws_hash, make_run

from distsbi.fanout import sample_catalog
from distsbi.store import layout

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1", "include_dashboard": False}


@pytest.fixture
def cluster(monkeypatch):
    """A head without cores, and one node of one core."""
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # all servers on the loopback interface
    monkeypatch.setenv("RAY_health_check_initial_delay_ms", "2000")
    monkeypatch.setenv("RAY_health_check_period_ms", "1000")
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
    made.add_node(**NODE)
    yield made
    made.shutdown()


def drain(cluster, node):
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline = int((time.time() + 60) * 1000)
    assert GcsClient(address=cluster.address).drain_node(node.node_id, reason, "a test", deadline)[0]


def driver(cluster, run, catalog, out, **options):
    """A process that samples the catalog on the cluster."""
    given = {"nsamples": 9, "rows_per_shard": 2, "address": cluster.address, **options}
    call = f"sample_catalog({str(run)!r}, {str(catalog)!r}, {str(out)!r}, **{given!r})"
    code = f"import distsbi.fanout.catalog as c; c.LOADER = 'fake_posterior:load'; c.{call}"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("end", ["dies", "leaves"])
def test_work_goes_to_who_is_there(cluster, make_catalog, tmp_path, end):
    """The only node is joined by another, and then dies or is drained: every row is done, and nobody is blamed."""
    catalog, out = make_catalog(), tmp_path / "out"
    slow = make_run(tmp_path / "slow", seconds_per_row=1.5)
    with driver(cluster, slow, catalog, out) as process:

        def until(what):
            deadline = time.monotonic() + 200
            while not what():
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)

        pids = lambda: {line["pid"] for line in layout.read_journal(out) if line["event"] == "done"}  # noqa: E731
        until(pids)
        (first,) = cluster.worker_nodes
        cluster.add_node(**NODE)
        until(lambda: len(pids()) == 2)
        if end == "dies":
            os.kill(first.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        else:
            drain(cluster, first)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err
    assert [line for line in layout.read_journal(out) if line["event"] == "failed"] == []
    sample_catalog(make_run(tmp_path / "run"), catalog, tmp_path / "calm", nsamples=9, workers=0)
    assert draws_hash(out) == draws_hash(tmp_path / "calm")


def test_a_machine_on_which_no_worker_starts_does_not_end_the_run(cluster, make_catalog, tmp_path):
    """The worker of one machine of two is killed, and loading fails there from then on: the other does every row."""
    catalog, out = make_catalog(20, switches={0: KILL_ONCE}), tmp_path / "out"
    cluster.add_node(**NODE)
    bad = make_run(tmp_path / "bad", seconds_per_row=3.0, bad_starts=99)
    with driver(cluster, bad, catalog, out, workers=2, max_failures=2) as process:
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 0, err
    assert len(list(bad.glob("start-*"))) >= 2
    assert err.count("which is left alone for") == 1
    assert "OSError: the disk is away" in err
    lines = layout.read_journal(out)
    assert sum(line["rows"] for line in lines if line["event"] == "done") == 20
    assert len({line["pid"] for line in lines if line["event"] == "done"}) <= 2
