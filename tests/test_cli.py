"""Every command: its help, what it writes, and its exit code with one sentence for what cannot be."""

import io
import json
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distsbi import load, open_catalog
from distsbi.cli import cli, main
from distsbi.data import write_pairs
from distsbi.fanout import Terminated
from distsbi.sampling.run import FORMAT
from distsbi.store.check import Problem

COMMANDS = ("simulate", "train", "sample", "check", "catalog", "plan", "status", "verify", "info", "demo")
SECOND = ("--coordinator", "localhost:1", "--num-processes", "2")
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def distsbi(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs the command line in this process: (exit code, stdout, stderr)."""
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])  # what --devices writes is undone afterwards
    for holder, name in ((threading, "excepthook"), (sys, "excepthook"), (sys, "unraisablehook")):
        monkeypatch.setattr(holder, name, getattr(holder, name))
    for name in ("absl", "asyncio", "concurrent.futures"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.getLogger(name).level)

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of a small network that was never trained: all that most commands need."""
    from distsbi.sampling import Tile
    from tests.gaussian import random_mlp_posterior

    path = tmp_path_factory.mktemp("cli") / "run"
    random_mlp_posterior(mesh={"data": 1}, dim_x=2, tile=Tile(4, 64)).save(str(path))
    return path


# Help


def test_commands() -> None:
    assert set(cli.commands) == set(COMMANDS)


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(distsbi: Cli, command: str | None) -> None:
    code, out, _ = distsbi(*([command] if command else []), "--help")
    assert code == 0
    assert out.startswith("Usage: distsbi")
    options = [param for param in cli.commands[command].params if param.param_type_name == "option"] if command else []
    assert all(getattr(option, "help", None) for option in options)


def test_version(distsbi: Cli) -> None:
    assert distsbi("--version")[1] == "distsbi, version 0.2.0\n"


def test_help_loads_no_jax() -> None:
    """Nor anything else that takes long to import."""
    code = """
import sys
from distsbi.cli import main
try:
    main(["train", "--help"])
except SystemExit:
    print([m for m in ("jax", "ray", "pydantic", "numpy", "pyarrow") if m in sys.modules])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


# What the commands do


def test_sample_npy_and_parquet_agree(distsbi: Cli, untrained: Path, tmp_path: Path) -> None:
    x = tmp_path / "x.npy"
    np.save(x, np.zeros((1, 2, 1), np.float32))
    npy, parquet = tmp_path / "draws.npy", tmp_path / "draws.parquet"
    code, out, err = distsbi("sample", untrained, "--x", x, "--nsamples", 300, "--seed", 1, "--out", npy)
    assert code == 0, err
    assert "300 draws" in out
    assert "theta_0" in out
    code, _, err = distsbi("sample", untrained, "--x", "0.0, 0.0", "--nsamples", 300, "--seed", 1, "--out", parquet)
    assert code == 0, err
    draws, table = np.load(npy), pq.read_table(parquet)
    assert draws.shape == (300, 2, 1)
    assert table.column_names == ["theta_0", "theta_1"]
    assert np.array_equal(draws[:, 1, 0], table["theta_1"].to_numpy())
    assert np.abs(draws).max() <= 1.0  # the prior
    assert sorted(file.name for file in tmp_path.iterdir()) == ["draws.npy", "draws.parquet", "x.npy"]


def test_sample_takes_solver_options(distsbi: Cli, untrained: Path, tmp_path: Path) -> None:
    draws = []
    folder = ("sample", untrained, "--x", "0,0", "--nsamples", 50, "--steps", 4, "--out", tmp_path / "folder")
    assert distsbi(*folder)[0] == 0
    code, _, err = distsbi(*folder, "--seed", 2)
    assert (code, "differ in seed: given 2, found 0); give another folder, or --overwrite." in err) == (2, True)
    for options in (["--solver", "euler", "--steps", "4"], ["--step-size", "0.25", "--solver", "heun"]):
        file = tmp_path / f"{len(draws)}.npy"
        code, _, err = distsbi("sample", untrained, "--x", "0,0", "--nsamples", 50, "--out", file, *options)
        assert code == 0, err
        draws.append(np.load(file))
    assert not np.array_equal(*draws)


def test_sample_takes_options_of_a_solver(distsbi: Cli, untrained: Path, tmp_path: Path) -> None:
    command = ["sample", untrained, "--x", "0,0", "-n", 50, "--solver", "stochastic_heun", "--steps", 4]
    options = ["--solver-option", "churn=2", "--solver-option", "s_noise=1.5"]
    code, _, err = distsbi(*command, *options, "--out", tmp_path / "draws.npy")
    assert code == 0, err
    churned = {"churn": 2.0, "s_noise": 1.5}
    asked = {"solver": "stochastic_heun", "steps": 4, "solver_options": churned}
    drawn = load(untrained).sample(0, np.zeros((1, 2, 1)), 50, **asked)
    np.testing.assert_array_equal(np.load(tmp_path / "draws.npy"), drawn)
    for wrong, says in (
        (["churn"], "write a number by name, such as churn=10; got churn="), (["churn=much"], "got churn=much"),
        (["churn=1", "churn=2"], "churn is given twice; keep one"), (["chrun=1"], "has no option 'chrun'; it has churn"),
    ):  # fmt: skip
        words = [word for option in wrong for word in ("--solver-option", option)]
        code, _, err = distsbi(*command, *words, "--out", tmp_path / "other.npy")
        assert (code, says in err) == (2, True), err


@pytest.mark.timeout(600)
@pytest.mark.long
def test_simulate_train_and_train_again(distsbi: Cli, tmp_path: Path) -> None:
    """The same command on a finished run is a resume with nothing left to do."""
    config, pairs, run = tmp_path / "config.yaml", tmp_path / "pairs", tmp_path / "run"
    config.write_text("model: {width: 16, depth: 1}\ntraining: {batch_size: 64, val_every: 10, calibrate: false}\n")
    code, out, err = distsbi("simulate", "two_moons", "--n", 500, "--out", pairs)
    assert code == 0, err
    assert f"next: distsbi train --data {pairs}" in out
    assert pq.read_table(pairs).num_rows == 500
    command = ["train", "--config", config, "--data", pairs, "--nsteps", 20, "--mesh", "data=2", "--out", run]
    code, out, err = distsbi(*command)
    assert code == 0, err
    assert "trained MLPFlowPipeline" in out
    assert "INFO training, update 0 of 20; the first ones take a while" in err
    assert "INFO update 20 of 20: loss " in err
    x = re.search(rf"next: distsbi sample {run} --x (\S+) ", out)
    assert x is not None
    before = json.loads((run / "spec.json").read_text())["weights_sha256"]
    code, out, err = distsbi(*command)
    assert code == 0, err
    assert "MLPFlowPipeline was trained already (" in out
    assert json.loads((run / "spec.json").read_text())["weights_sha256"] == before
    draws = tmp_path / "draws.npy"
    code, _, err = distsbi("sample", run, "--x", x[1], "--nsamples", 500, "--out", draws)  # as the hint says
    assert code == 0, err
    assert np.abs(np.load(draws)).max() <= 1.0  # the prior, known from what the folder of pairs says of its task
    priors = ("--prior", "up=Uniform(-1, 1)", "--prior", "down=Uniform(-2, 2)")
    code, out, err = distsbi(
        "train", "--config", config, "--data", pairs, "--nsteps", 10, *priors, "--out", tmp_path / "own"
    )
    assert code == 0, err
    spec = json.loads((tmp_path / "own" / "spec.json").read_text())
    assert spec["parameter_names"] == ["up", "down"]
    assert spec["standardizer"]["high"] == [[1.0], [2.0]]
    code, _, err = distsbi("train", "--data", pairs, "--prior", "up=Uniform(-1, 1)", "--out", tmp_path / "few")
    assert code == 2
    assert "the prior is of up, but the pairs in" in err
    assert (
        "have the parameters theta_0, theta_1; give a distribution of each, in this order, or leave the prior out"
        in err
    )
    code, _, err = distsbi("status", pairs)
    assert code == 2
    assert f"distsbi verify {pairs} checks pairs and draws" in err


@pytest.mark.timeout(600)
def test_simulate_and_train_of_ones_own(distsbi: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in this folder; training knows the prior from the folder of pairs."""
    (tmp_path / "mine_for_the_cli.py").write_text(
        "def run(theta, rng):\n    assert theta[0] < 1.9, 'too heavy'\n    return theta + rng.normal(size=2)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    priors = ("--prior", "mass=Uniform(1, 2)", "--prior", "spin=Uniform(-1, 1)")
    command = ["simulate", "--simulator", "mine_for_the_cli:run", *priors, "--n", 300, "--out", "pairs", "--workers", 0]
    with monkeypatch.context() as patch:
        patch.setattr("distsbi.fanout.cluster.connected", None)  # --workers 0 is without Ray
        code, out, err = distsbi(*command)
    assert code == 0, err
    found = re.search(r"(\d+) pairs of mine_for_the_cli:run in pairs, (\d+) rows failed", out)
    assert found is not None
    assert int(found[1]) + int(found[2]) == 300
    assert 10 < int(found[2]) < 60
    assert f"bad      {found[2]} rows failed: AssertionError: too heavy" in err
    assert "most rows failed" not in err
    assert "--missing" not in err
    assert "now: 0 of 1 shards" in distsbi(*command)[1]
    code, out, _ = distsbi("status", "pairs")
    assert f"rows     {found[1]} ok, {found[2]} failed" in out
    assert f"bad      {found[2]} rows failed: AssertionError: too heavy" in out
    assert "1 file of pairs checked" in distsbi("verify", "pairs")[1]
    shard = tmp_path / "pairs" / "shard-00000000-of-00000001.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = distsbi("verify", "pairs")
    assert code == 1
    assert f"{shard.name} is not the file that was written" in err
    shard.unlink()
    again = distsbi("status", "pairs")[1].splitlines()[-1].removeprefix("go on with: ")
    assert "now: 1 of 1 shards" in distsbi(*shlex.split(again)[1:], "--workers", 0)[1]
    (tmp_path / "config.yaml").write_text("model: {width: 16, depth: 1}\ntraining: {calibrate: false}\n")
    train = ("train", "--config", "config.yaml", "--data", "pairs", "--nsteps", 5)
    assert distsbi(*train, "--stream", "--out", "streamed")[0] == 2  # a single row group has nothing to hold out
    code, _, err = distsbi(*train, "--out", "run")
    assert code == 0, err
    spec = json.loads((tmp_path / "run" / "spec.json").read_text())
    assert spec["parameter_names"] == ["mass", "spin"]
    assert spec["standardizer"]["high"] == [[2.0], [1.0]]


def test_many_failures_are_pointed_out(distsbi: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_for_the_cli.py").write_text(
        "import numpy as np\ndef run(theta):\n    return np.where(theta > 0.9, theta, np.nan)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    simulate = (
        "simulate",
        "--simulator",
        "bad_for_the_cli:run",
        "--prior",
        "a=Uniform(0, 1)",
        "--n",
        100,
        "--workers",
        0,
    )
    code, _, err = distsbi(*simulate, "--out", "pairs")
    assert code == 0, err
    assert "most rows failed: look at the reasons before you train on the others" in err
    assert "if NaN is an entry that was not observed, simulate into another folder with --missing" in err


def test_devices_makes_virtual_ones() -> None:
    """In a new process, since a process's devices are made once."""
    code = """
import sys
from distsbi.cli.options import make_mesh
axes = make_mesh(3, None)
import jax
print(axes, jax.device_count())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == "{'data': 3} 3"


def test_a_warning_is_a_sentence(distsbi: Cli, tmp_path: Path) -> None:
    """Without the line of ours or of click's that it is of."""
    from tests.gaussian import random_mlp_posterior

    random_mlp_posterior(facts={"x_extent": [1.0, 1.5, 1.0]}).save(tmp_path / "run")
    code, _, err = distsbi(
        "sample", tmp_path / "run", "--x", "900,0,0", "-n", 5, "--steps", 2, "--out", tmp_path / "d.npy"
    )
    assert code == 0, err
    assert "Warning: x[0] lies far outside the simulations: its entry 0 (900) is " in err
    assert ".py" not in err and "UserWarning" not in err


def test_info(distsbi: Cli, untrained: Path) -> None:
    code, out, _ = distsbi("info", untrained)
    assert code == 0
    assert "MLP" in out
    assert "theta_0 in (-1, 1), theta_1 in (-1, 1)" in out
    assert json.loads(distsbi("info", untrained, "--json")[1])["network"]["name"] == "MLP"
    from distsbi.cli.info import _certificate, _training

    facts = {"steps": 300, "best_val_loss": 1.23456, "config": {"batch_size": 64}}
    assert _training(facts) == [("training", "300 updates of 64 pairs, best validation loss 1.2346")]
    assert not _training(None)

    says = _certificate({"met": False, "chosen": {"q95": None}})  # of grids that all failed
    assert says == "NOT under tolerance: more than 5 % of draws are not finite"


def test_catalog(distsbi: Cli, untrained: Path, tmp_path: Path) -> None:
    catalog, out = tmp_path / "catalog.parquet", tmp_path / "out"
    pq.write_table(pa.table({"name": ["a", "b", "c"], "u": [0.0, 0.1, np.nan], "v": [0.0, 0.2, 0.3]}), catalog)
    command = ["catalog", untrained, catalog, out, "--nsamples", 40, "--workers", 0, "--id-column", "name"]
    command += ["--x-columns", "u,v"]
    code, text, err = distsbi(*command)
    assert code == 0, err
    assert "3 rows in" in text
    assert "2 with draws, 1 without" in text
    assert "1 row invalid: x has 1 values that are NaN" in err
    assert "or train with missing=True (on the command line --missing)" in err
    assert "column `message`" in err
    assert open_catalog(out).draws("b").shape == (40, 2, 1)
    code, text, err = distsbi(*command)
    assert code == 0, err
    assert "now: 0 of 1 shards" in text
    code, _, err = distsbi(*command[:-4], "--x-columns", "u,v")
    assert code == 2
    assert "pass --id-column <its name>, or --id-column '' to use row numbers" in err


def test_every_shard_is_a_log_line(
    distsbi: Cli, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a bar on a terminal it is a line of its own, too."""
    np.save(tmp_path / "x.npy", np.zeros((3, 2), np.float32))
    command = ["catalog", untrained, tmp_path / "x.npy", "--nsamples", 40, "--workers", 0, "--rows-per-shard", 1]
    shard = re.compile(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[-+]\d{4} INFO shard (\d) of 3: 1 rows in [\d.]+ s "
        rf"on {re.escape(socket.gethostname())} \(process \d+, cpu: .*\)"
    )
    monkeypatch.setattr(logging.root, "handlers", [logging.StreamHandler()])  # as some libraries give it
    lines = distsbi(*command, tmp_path / "out")[2].splitlines()
    assert [found[1] for found in map(shard.fullmatch, lines) if found] == ["0", "1", "2"]
    assert distsbi(*command, tmp_path / "quiet", "--quiet")[2] == ""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    distsbi(*command, tmp_path / "terminal")
    lines = [line.split("\r")[-1] for line in terminal.getvalue().split("\n")]
    assert [found[1] for found in map(shard.fullmatch, lines) if found] == ["0", "1", "2"]
    assert "catalog: 100%" in lines[3]


def test_status_and_verify(distsbi: Cli, untrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    np.save(tmp_path / "x.npy", np.asarray([[0.0, 0.0], [0.1, np.nan], [0.2, 0.3]], np.float32))
    command = ["catalog", untrained, tmp_path / "x.npy", out, "--nsamples", 40, "--workers", 0, "--rows-per-shard", 2]
    assert distsbi(*command)[0] == 0
    code, text, _ = distsbi("status", out)
    assert code == 0
    assert "2 of 2 shards, 3 of 3 rows (100.0%)" in text
    assert "2 ok, 1 invalid" in text
    assert "bad      1 row invalid: x has" in text
    assert json.loads(distsbi("status", out, "--json")[1])["shards_done"] == 2
    code, text, _ = distsbi("verify", out, "--fraction", 1)
    assert code == 0
    assert text.startswith("2 of 2 shards checked\n")
    assert "3 rows drawn again: 3 with the same bits" in text
    shard = out / "shard-00000001-of-00000002.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    code, _, err = distsbi("verify", out, "--fraction", 0)
    assert code == 1
    assert f"{shard.name} is not the file that was written" in err
    assert "give --repair" in err
    (tmp_path / "x.npy").rename(tmp_path / "moved.npy")
    code, text, err = distsbi("verify", out, "--fraction", 0, "--repair", "--workers", 0)
    assert code == 1
    assert f"1 shard could not be made: there is no catalog at {tmp_path / 'x.npy'}" in err
    again = text.strip().splitlines()[-1].removeprefix("make them with: ")
    assert f"go on with: {again}" in distsbi("status", out)[1]
    code, text, err = distsbi("verify", out, "--catalog", tmp_path / "moved.npy", "--repair", "--workers", 0)
    assert code == 0
    assert f"shard 1 was bad, and has been made again (found: {shard.name} is not the file that was written" in err
    assert text.endswith("made 1 shard again\n2 of 2 shards are good\n")
    shard.write_bytes(b"")
    (tmp_path / "moved.npy").rename(tmp_path / "x.npy")
    assert distsbi("verify", out, "--repair", "--workers", 0)[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr("distsbi.fanout.verify.check_ids", lambda *_: [Problem(None, "1 ids occur more than once: 0")])
        code, _, err = distsbi("verify", out, "--repair", "--workers", 0)
    assert code == 1
    assert "1 ids occur more than once: 0.\nids that occur more than once are not repaired" in err
    shard.unlink()
    code, text, err = distsbi("verify", out)
    assert (code, err) == (1, f"not complete; go on with: {again}\n")
    code, text, _ = distsbi(*shlex.split(again)[1:], "--workers", 0)
    assert "now: 1 of 2 shards" in text
    assert distsbi("verify", out)[0] == 0
    assert distsbi("status", tmp_path)[0] == 2
    (tmp_path / "begun" / "_distsbi").mkdir(parents=True)
    code, _, err = distsbi("status", tmp_path / "begun")
    assert code == 2
    assert "still starting, or ended before its first shard" in err


# What cannot be


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "three_moons", "--out", "{tmp}/p"], "no task named 'three_moons'; the known tasks are"),
        (["simulate", "two_moons", "--n", "0", "--out", "{tmp}/p"], "0 is not in the range x>=1"),
        (["simulate", "two_moons"], "Missing option '--out'"),
        (["simulate", "--out", "{tmp}/p"], "give either TASK or --simulator"),
        (["simulate", "two_moons", "--simulator", "a:b", "--out", "{tmp}/p"], "give either TASK or --simulator"),
        (["simulate", "two_moons", "--workers", "2", "--out", "{tmp}/p"], "--workers is for --simulator"),
        (["simulate", "two_moons", "--no-resume", "--out", "{tmp}"], "is not empty"),
        (["simulate", "--simulator", "a:b", "--out", "{tmp}/p"], "--simulator needs --prior NAME=DISTRIBUTION"),
        (
            ["simulate", "--simulator", "no.such:b", "--prior", "a=Normal(0, 1)", "--out", "{tmp}/p"],
            "cannot be imported",
        ),
        (
            ["simulate", "--simulator", "a:b", "--prior", "a=Normal", "--out", "{tmp}/p"],
            "must read like Uniform(-1, 1)",
        ),
        (["simulate", "--simulator", "a:b", "--prior", "a", "--prior", "a", "--out", "{tmp}/p"], "is given twice"),
        (
            ["simulate", "--simulator", "a:b", "--prior", "a Normal(0, 1)", "--out", "{tmp}/p"],
            "'a Normal(0, 1)' has no =",
        ),
        (["simulate", "--simulator", "a:b", "--prior", "a Normal(loc=0)", "--out", "{tmp}/p"], "has no = after a name"),
        (["simulate", "--simulator", "a:b", "--shard-size", "0", "--out", "{tmp}/p"], "0 is not in the range x>=1"),
        (["train", "--out", "{tmp}/r"], "give either --task or --data"),
        (["train", "--task", "two_moons", "--data", "p", "--out", "{tmp}/r"], "both task 'two_moons' and path 'p'"),
        (["train", "--task", "moons", "--out", "{tmp}/r"], "no task named 'moons'"),
        (["train", "--task", "slcp", "--stream", "--out", "{tmp}/r"], "data.stream is for a folder of pairs"),
        (["train", "--data", "{tmp}/none", "--out", "{tmp}/r"], "is not a folder of pairs"),
        (["train", "--config", "{tmp}/none.yaml", "--out", "{tmp}/r"], "cannot read the configuration"),
        (["train", "--task", "two_moons", "--network", "unet", "--out", "{tmp}/r"], "--network must be one of"),
        (["train", "--task", "two_moons", "--mesh", "two", "--out", "{tmp}/r"], "write axis sizes such as data=2"),
        (["train", "--task", "two_moons", "--mesh", "rows=2", "--out", "{tmp}/r"], "unknown mesh axes ['rows']"),
        (["train", "--task", "two_moons", "--no-resume", "--out", "{tmp}"], "is not empty"),
        (["train", "--task", "two_moons", "--steps", "5", "--out", "{tmp}/r"], "No such option '--steps'"),
        (["sample", "{tmp}/none", "--x", "0,0", "--out", "{tmp}/d.npy"], "no such folder"),
        (["sample", "{tmp}", "--x", "0,0", "--out", "{tmp}/d.npy"], "is no finished run"),
        (["sample", "{run}", "--x", "0,0", "--out", "{tmp}/d.csv"], "must end in .npy or .parquet"),
        (
            ["sample", "{run}", "--x", "0,0", "--out", "{tmp}/d.npy", *SECOND, "--process-id", "1"],
            "several processes write a dataset",
        ),
        (
            ["train", "--task", "two_moons", "--out", "{tmp}/r", *SECOND, "--process-id", "2"],
            "process id 2 is out of range",
        ),
        (["train", "--task", "two_moons", "--out", "{tmp}/r", *SECOND], "--process-id missing"),
        (
            ["train", "--task", "two_moons", "--out", "{tmp}/r", *SECOND, "--process-id", "1", "--ray-workers", "2"],
            "starts the processes itself",
        ),
        (["sample", "{run}", "--x", "0,0", "--out", "{tmp}/there.npy"], "exists; give --overwrite"),
        (["sample", "{run}", "--x", "0,0", "--out", "{tmp}/no/d.npy"], "there is no folder"),
        (["sample", "{run}", "--x", "0,zero", "--out", "{tmp}/d.npy"], "--x must be a .npy file or numbers"),
        (
            ["sample", "{run}", "--x", "0,0,0", "--out", "{tmp}/d.npy"],
            "must be one observation of shape (2, 1); got (3,)",
        ),
        (["sample", "{run}", "--x", "0,nan", "--out", "{tmp}/d.npy"], "NaN or infinite"),
        (["sample", "{run}", "--x", "{tmp}/there.npy", "--out", "{tmp}/d.npy"], "cannot be read as arrays"),
        (["sample", "{run}", "--x", "0,0", "--nsamples", "0", "--out", "{tmp}/d.npy"], "nsamples must be a positive"),
        (["sample", "{run}", "--x", "0,0", "--solver", "rk9", "--out", "{tmp}/d.npy"], "rk9"),
        (["catalog", "{run}", "{tmp}/none.parquet", "{tmp}/out", "--workers", "0"], "none.parquet"),
        (["catalog", "{tmp}/none", "{tmp}/none.parquet", "{tmp}/out", "--workers", "0"], "none"),
        (
            ["catalog", "{run}", "{tmp}/there.npy", "{tmp}/out", "--nsamples", "0"],
            "nsamples must be a positive integer",
        ),
        (
            ["catalog", "{run}", "{tmp}/there.npy", "{tmp}/out", "--seed", "1", "--seed=2"],
            "--seed is given twice; keep one",
        ),
        (["train", "--data", "{tmp}/a", "--data", "{tmp}/b", "--out", "{tmp}/r"], "--data is given twice; keep one"),
        (["verify", "{tmp}/none"], "does not exist"),
        (["verify", "{tmp}/there.npy"], "there.npy is a file; give the folder"),
        (["verify", "{run}"], "is a run directory, whose weights are checked whenever it is loaded"),
        (["demo", "--out", "{tmp}"], "not only an earlier demo; give another --out"),
        (["info", "{tmp}/none"], "no such folder"),
        (["info", "{tmp}/damaged"], "spec.json is damaged: it has no network; restore it from a copy"),
        (["train", "--task", "slcp", "--out", "{tmp}/there.npy"], "there.npy is a file; give a folder"),
        (["fit"], "No such command 'fit'"),
    ],
)
def test_user_errors(distsbi: Cli, untrained: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "there.npy").write_bytes(b"not an array")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "spec.json").write_text(f'{{"format": {FORMAT}}}')
    code, _, err = distsbi(*(argument.format(tmp=tmp_path, run=untrained) for argument in arguments))
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert (tmp_path / "there.npy").read_bytes() == b"not an array"
    assert not (tmp_path / "d.npy").exists()


def test_failures_exit_with_1(distsbi: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise RuntimeError("the device went away")

    monkeypatch.setattr("distsbi.tasks.get_task", fail)
    code, _, err = distsbi("simulate", "two_moons", "--out", "nowhere")
    assert code == 1
    assert err == "Failed: RuntimeError: the device went away (--debug shows the traceback)\n"
    code, _, err = distsbi("simulate", "two_moons", "--out", "nowhere", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_interrupt_exits_with_130(distsbi: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distsbi.tasks.get_task", interrupt)
    code, _, err = distsbi("simulate", "two_moons", "--out", "nowhere")
    assert code == 130
    assert "Interrupted: what is finished is kept; give the same command again to go on." in err

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt("stopped, 2 of 6 shards are finished in out; the same call goes on from there.")

    monkeypatch.setattr("distsbi.fanout.sample_catalog", stopped)
    code, _, err = distsbi("catalog", "run", "catalog.parquet", "out")
    assert code == 130
    assert err.strip() == "Interrupted: stopped, 2 of 6 shards are finished in out; the same call goes on from there."

    def terminated(*_: Any, **__: Any) -> None:
        raise Terminated("stopped by SIGTERM; the same call goes on from there.")

    monkeypatch.setattr("distsbi.fanout.sample_catalog", terminated)
    assert distsbi("catalog", "run", "catalog.parquet", "out")[0] == 143
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("distsbi.cli.train.train_member", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    code, _, err = distsbi("train", "--task", "two_moons", "--out", "out")
    assert code == 143
    assert "Interrupted: what is finished is kept; give the same command again to go on." in err
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.setattr("distsbi.sampling.load", interrupt)
    code, _, err = distsbi("sample", "run", "--x", "0,0", "--out", "d.npy")  # of which nothing is kept
    assert code == 130
    assert err.strip() == "Interrupted."


@pytest.mark.long
def test_a_full_disk_leaves_nothing_half_written(distsbi: Cli, untrained: Path, small_disk: Any) -> None:
    for name in ("draws.npy", "draws.parquet"):
        out = small_disk.path / name
        code, _, err = distsbi("sample", untrained, "--x", "0,0", "--nsamples", 100_000, "--out", out)
        assert code == 1
        assert f"{name} could not be written (No space left on device); free space or give another --out" in err
        assert list(small_disk.path.iterdir()) == []


@pytest.mark.long
def test_a_disk_that_fills_while_training_is_told_in_one_sentence(small_disk: Any) -> None:
    """In a process of its own, for the tracebacks of orbax's threads go past what a test captures."""
    command = [sys.executable, "-m", "distsbi.cli", "train", "--task", "two_moons", "--nsteps", "2"]
    done = subprocess.run(
        [*command, "--out", str(small_disk.path / "run")], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 1
    assert "is full; free some space and run the same training again" in done.stderr
    assert "Traceback" not in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.strip() and " INFO " not in line]) == 1


@pytest.mark.long
def test_virtual_devices_come_before_a_prior_that_starts_jax(tmp_path: Path) -> None:
    """A HalfNormal holds arrays, so making it starts JAX; in a process of its own, which has one device unless told."""
    theta = np.abs(np.random.default_rng(0).normal(size=(40, 1)))
    write_pairs(tmp_path / "pairs", theta, theta)
    command = [
        sys.executable,
        "-m",
        "distsbi.cli",
        "train",
        "--data",
        str(tmp_path / "pairs"),
        "--prior",
        "a=HalfNormal(1)",
        "--config",
        str(tmp_path / "config.yaml"),
    ]
    (tmp_path / "config.yaml").write_text("model: {width: 16, depth: 1}\ntraining: {calibrate: false}\n")
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    env = {**os.environ, "XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(
        [*command, "--devices", "2", "--nsteps", "1", "--out", str(tmp_path / "run")],
        env=env, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    spec = json.loads((tmp_path / "run" / "spec.json").read_text())
    assert spec["facts"]["training"]["devices"] == 2
    assert spec["parameter_names"] == ["a"]
