"""Faults thrown at a running catalog, and whether it ends with the draws of an undisturbed one.

    python benchmarks/faults.py --seed 1 --injections 60
    python benchmarks/faults.py --seed 1 --injections 8 --kinds raylet head
    python benchmarks/faults.py --summary

A Ray cluster of several nodes on this machine (a head without cores, two nodes of one core each), a driver in a process of its own, a
real network, and real signals at random times, all from the seed. After each injection the driver is given again
where it died; then every row must be there once, quarantined rows must be the guilty ones and no others, all checksums must agree, and the
SHA-256 of all good rows, sorted by id, must be that of the undisturbed run. A result is a line of
benchmarks/results/faults.jsonl; what is there already for a seed is not done again.

    worker     SIGKILL of a worker that is sampling
    rename     SIGKILL of a worker between writing its shard and giving it its name
    raylet     SIGKILL of a node's raylet, which takes its workers along; another node joins later
    drain      a node is told that it will be preempted; another one joins
    driver     SIGKILL of the driver; the same call again
    sigterm    SIGTERM to the driver, which must end by itself; the same call again
    head       SIGKILL of the head's processes; another cluster; the same call again
    full_disk  the disk is full; it grows; the same call again
    abort      a row that aborts its process, always
    hang       a row that never ends
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from common import HERE, append, busy_cores, provenance

RESULTS = HERE / "results" / "faults.jsonl"
KINDS = ("worker", "rename", "raylet", "drain", "driver", "sigterm", "head", "full_disk", "abort", "hang")
ROWS, ROWS_PER_SHARD, NSAMPLES, SECONDS_PER_ROW = 120, 5, 2_000, 0.15
ABORT, HANG = 1001.0, 1002.0
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "node_ip_address": "127.0.0.1", "include_dashboard": False}
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # with which Ray lets all its servers listen on 127.0.0.1
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",  # a dead node is known in seconds, not in a quarter of a minute
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    "JAX_PLATFORMS": "cpu",
}
PATIENCE = 600.0  # seconds for a driver to end


# In a worker


class Faulty:
    """A posterior that is slow, and whose process dies or hangs at some rows."""

    def __init__(self, run: str):
        from distsbi import files, sampling

        self._posterior = sampling.load(run)
        armed, replace = Path(run) / "kill-at-rename", os.replace

        def rename(source: Any, target: Any) -> None:
            if Path(target).name.startswith("shard-"):
                with contextlib.suppress(FileNotFoundError):
                    armed.unlink()  # one worker alone
                    (Path(run) / "killed-at-rename").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        files.os = type("os", (), {**vars(os), "replace": staticmethod(rename)})  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._posterior, name)

    def draw(self, key: Any, xs: np.ndarray, nsamples: int, **options: Any) -> np.ndarray:
        for x in xs[:, 0, 0]:
            if x == ABORT:
                os.abort()
            if x == HANG:
                time.sleep(3600)
        if nsamples == NSAMPLES:  # not when it compiles
            time.sleep(SECONDS_PER_ROW * len(xs))
        return self._posterior.draw(key, xs, nsamples, **options)


def load(run: str) -> Faulty:
    return Faulty(run)


# In a driver


def drive(run: str, catalog: str, out: str, address: str | None, time_limit: float | None) -> None:
    """One call of sample_catalog. Exit codes: 0 done, 3 stopped by SIGTERM, 4 the disk is full, 1 anything else."""
    from distsbi.fanout import Terminated, catalog as catalogs, sample_catalog

    catalogs.LOADER = "faults:load"
    options: dict[str, Any] = {"workers": 0} if address is None else {"address": address, "max_failures": 2}
    try:
        sample_catalog(
            run, catalog, out,
            nsamples=NSAMPLES, rows_per_shard=ROWS_PER_SHARD, steps=4, show_progress=False, time_limit=time_limit, **options,
        )  # fmt: skip
    except Terminated:
        sys.exit(3)
    except OSError as error:
        print(error, file=sys.stderr)
        sys.exit(4 if "is full" in str(error) else 1)


class Driver:
    """A process that runs `drive`."""

    def __init__(self, bench: "Bench", out: Path, catalog: Path, time_limit: float | None = None):
        self.out = out
        self._log = open(bench.folder / f"driver-{time.time_ns()}.log", "w+")  # noqa: SIM115
        call = [sys.executable, __file__, "--drive", str(bench.run), str(catalog), str(out), bench.cluster.address]
        self.process = subprocess.Popen(
            [*call, *([str(time_limit)] if time_limit else [])], stdout=self._log, stderr=self._log
        )

    def wait_for(self, what: Any, seconds: float = PATIENCE) -> Any:
        """What `what()` gives, once it gives something; fails if the driver ends before."""
        deadline = time.monotonic() + seconds
        while not (found := what()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the driver ended ({self.process.poll()}) or took too long\n{self.tail()}")
            time.sleep(0.05)
        return found

    def end(self, seconds: float = PATIENCE) -> int:
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return -999

    def tail(self) -> str:
        self._log.flush()
        return Path(self._log.name).read_text()[-3000:]


# The campaign


class Bench:
    """The cluster, the run, the catalog and its undisturbed draws."""

    def __init__(self, folder: Path):
        from catalog_scaling import make_catalog, make_run

        self.folder, self.run, self.catalog = folder, folder / "run", folder / "catalog.parquet"
        make_run(self.run)
        make_catalog(self.catalog, ROWS, 2)
        self.cluster = self._start()
        drive_here = [sys.executable, __file__, "--drive", str(self.run), str(self.catalog), str(folder / "calm")]
        subprocess.run([*drive_here, ""], check=True, env={**os.environ, "PJRT_NPROC": "1"})
        self.calm = hashes(folder / "calm")

    def _start(self) -> Any:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "num_cpus": 0})
        for _ in range(2):
            cluster.add_node(**NODE)
        return cluster

    def restart(self) -> None:
        with contextlib.suppress(Exception):  # much of it is dead
            self.cluster.shutdown()
        self.cluster = self._start()

    def mend(self) -> None:
        """Two nodes again."""
        for node in list(self.cluster.worker_nodes):
            if (
                not node.live_processes()
                or "raylet" not in node.all_processes
                or node.all_processes["raylet"][0].process.poll() is not None
            ):
                self.cluster.remove_node(node, allow_graceful=False)
        while len(self.cluster.worker_nodes) < 2:
            self.cluster.add_node(**NODE)

    def guilty(self, row: int, switch: float) -> Path:
        """The catalog with a row that kills or hangs."""
        table = pq.read_table(self.catalog)
        x = np.stack(table["x"].to_numpy())
        x[row, 0] = switch
        path = self.folder / f"guilty-{row}-{switch:g}.parquet"
        pq.write_table(pa.table({"id": table["id"], "x": list(x)}), path)
        return path


def hashes(out: Path) -> dict[int, str]:
    """SHA-256 of the decoded draws of every good row, by id. Raises ValueError if a row comes twice."""
    table = pq.read_table(out, columns=["id", "status", "draws"])
    if pc.count_distinct(table["id"]).as_py() != len(table):
        raise ValueError("a row comes twice")
    table = table.filter(pc.field("status") == "ok").sort_by("id").combine_chunks()
    draws = table["draws"].chunk(0).storage.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
    return {
        id: hashlib.sha256(row.tobytes()).hexdigest() for id, row in zip(table["id"].to_pylist(), draws, strict=True)
    }


def whole(found: dict[int, str]) -> str:
    return hashlib.sha256("".join(found[id] for id in sorted(found)).encode()).hexdigest()


def shards(out: Path) -> int:
    return len(list(out.glob("shard-*")))


def worker_pids(out: Path) -> list[int]:
    """Workers of this folder that live, by its journal."""
    from distsbi.store import layout

    found = []
    for pid in dict.fromkeys(line["pid"] for line in layout.read_journal(out) if line["event"] == "done"):
        with contextlib.suppress(FileNotFoundError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::"):
                found.append(pid)
    return found


def inject(bench: Bench, kind: str, out: Path, rng: random.Random) -> dict[str, Any]:
    """Runs a catalog with one fault of a kind, to its end. Returns what was done."""
    told: dict[str, Any] = {"calls": 1}
    catalog, limit = bench.catalog, None
    if kind in ("abort", "hang"):
        told["row"] = rng.randrange(ROWS)
        catalog = bench.guilty(told["row"], ABORT if kind == "abort" else HANG)
        limit = 10.0 if kind == "hang" else None
    driver = Driver(bench, out, catalog, limit)
    expected = 0
    if kind in ("worker", "rename", "raylet", "drain", "driver", "sigterm", "head"):
        count = ROWS // ROWS_PER_SHARD
        told["shards_before"] = rng.randrange(1, count - 3)  # up to when the last are handed out, two to each worker
        driver.wait_for(lambda: shards(out) >= told["shards_before"] and worker_pids(out))
        told["delay"] = round(rng.uniform(0, min(2.0, (count - told["shards_before"]) / 8)), 3)  # before the end
        time.sleep(told["delay"])
    if kind == "worker":
        os.kill(rng.choice(worker_pids(out)), signal.SIGKILL)
    elif kind == "rename":
        (bench.run / "kill-at-rename").touch()
        driver.wait_for((bench.run / "killed-at-rename").exists)
        (bench.run / "killed-at-rename").unlink()
    elif kind == "raylet":
        node = rng.choice(list(bench.cluster.worker_nodes))
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
        time.sleep(rng.uniform(1, 5))
        bench.mend()
    elif kind == "drain":
        drain(bench.cluster.address, rng.choice(list(bench.cluster.worker_nodes)).node_id)
        time.sleep(rng.uniform(1, 5))
        bench.cluster.add_node(**NODE)
    elif kind == "driver":
        driver.process.kill()
        expected = -signal.SIGKILL
    elif kind == "sigterm":
        driver.process.terminate()
        expected = 3
    elif kind == "head":
        for processes in list(bench.cluster.head_node.all_processes.values()):
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.process.pid, signal.SIGKILL)
        expected = 1
    elif kind == "full_disk":
        expected = 4
    told["exit"] = driver.end(90 if kind == "head" else PATIENCE)
    if kind == "head":
        bench.restart()
    if told["exit"] != expected and not (
        kind == "sigterm" and told["exit"] == 0 and shards(out) == ROWS // ROWS_PER_SHARD
    ):
        # after SIGTERM the last shards may be done within the grace, and the catalog with them
        raise RuntimeError(f"the driver ended with {told['exit']}, not {expected}\n{driver.tail()}")
    if kind == "full_disk":
        grow(out.parent)
    told["shards_kept"] = shards(out)
    if expected:
        again = Driver(bench, out, catalog, limit)
        told["calls"] = 2
        if code := again.end():
            raise RuntimeError(f"the second driver ended with {code}\n{again.tail()}")
    return told


def drain(address: str, node: str) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = GcsClient(address=address).drain_node(node, reason, "a fault", int((time.time() + 60) * 1000))
    if not accepted:
        raise RuntimeError(f"the node does not drain: {why}")


def small_disk(path: Path) -> None:
    path.mkdir(parents=True)
    size = f"size={ROWS * NSAMPLES * 2 * 4 // 2}"  # half of the draws
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(path)], check=True, capture_output=True)


def grow(path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "remount,size=64m", "tmpfs", str(path)], check=True)


def check(bench: Bench, out: Path, kind: str, told: dict[str, Any]) -> dict[str, Any]:
    """What must hold after every fault. Raises AssertionError saying what does not."""
    from distsbi.store import layout, open_catalog

    catalog = open_catalog(out)
    problems = catalog.verify()
    if problems:
        raise AssertionError(f"verify says {problems}")
    quarantined = {told["row"]} if kind in ("abort", "hang") else set()
    rows = catalog.table(["id", "row", "status"]).to_pylist()
    if sorted(row["row"] for row in rows) != list(range(ROWS)):
        raise AssertionError("a row is lost, or comes twice")
    found = {row["row"] for row in rows if row["status"] != "ok"}
    if found != quarantined:
        raise AssertionError(f"rows {sorted(found)} have no draws; {sorted(quarantined)} should have none")
    expected = {id: value for id, value in bench.calm.items() if id not in quarantined}
    made = hashes(out)
    if whole(made) != whole(expected):
        raise AssertionError(f"rows {[id for id in expected if made.get(id) != expected[id]][:10]} have other draws")
    events = Counter(line["event"] for line in layout.read_journal(out))
    return {"sha256": whole(made), "rows": len(rows), "events": dict(events)}


def campaign(seed: int, injections: int, kinds: list[str], results: Path) -> None:
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {line["index"] for line in lines if line["seed"] == seed and line["kinds"] == kinds}
    todo = [index for index in range(injections) if index not in done]
    print(f"seed {seed}: {len(todo)} of {injections} injections to do", flush=True)
    if not todo:
        return
    folder = Path(tempfile.mkdtemp(prefix="distsbi-faults-"))
    bench = Bench(folder)
    try:
        for index in todo:
            rng = random.Random(f"{seed} {index}")
            order = random.Random(f"{seed} {index // len(kinds)}").sample(
                kinds, len(kinds)
            )  # each kind once in a round
            kind = order[index % len(kinds)]
            out = folder / f"out-{index}" / "out"
            line = {"seed": seed, "kinds": kinds, "index": index, "kind": kind, "busy_before": busy_cores()}
            began = time.monotonic()
            try:
                small_disk(out.parent) if kind == "full_disk" else out.parent.mkdir()
                told = inject(bench, kind, out, rng)
                line |= {**told, **check(bench, out, kind, told), "ok": True}
            except (AssertionError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
                line |= {"ok": False, "error": str(error)}
            line |= {"seconds": round(time.monotonic() - began, 1), **provenance()}
            append(results, line)
            print(
                f"{index:3d} {kind:<10} {'ok' if line['ok'] else 'FAILED ' + line['error'][-1500:]} {line['seconds']} s",
                flush=True,
            )
            if kind == "full_disk" and out.parent.is_mount():
                subprocess.run(["umount", "-l", str(out.parent)], check=True)
            if line["ok"]:
                shutil.rmtree(out.parent)
                bench.mend()
            else:
                bench.restart()
    finally:
        bench.cluster.shutdown()
    if all(line["ok"] for line in map(json.loads, results.read_text().splitlines()) if line["seed"] == seed):
        shutil.rmtree(folder)
    else:
        print(f"what failed is kept in {folder}")


def summary(results: Path) -> None:
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    for kind in KINDS:
        of = [line for line in lines if line["kind"] == kind]
        if of:
            print(f"{kind:<10} {sum(line['ok'] for line in of)} of {len(of)} ok")
    print(f"{'all':<10} {sum(line['ok'] for line in lines)} of {len(lines)} ok")


def main() -> None:
    if sys.argv[1:2] == ["--drive"]:
        run, catalog, out, address, *limit = sys.argv[2:]
        drive(run, catalog, out, address or None, float(limit[0]) if limit else None)
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--injections", type=int, default=60)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--summary", action="store_true")
    args = parser.parse_args()
    if args.summary:
        summary(args.results)
        return
    os.environ.update(ENVIRONMENT)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        dict.fromkeys([str(HERE), str(HERE.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    ).strip(os.pathsep)
    campaign(args.seed, args.injections, args.kinds, args.results)


if __name__ == "__main__":
    main()
