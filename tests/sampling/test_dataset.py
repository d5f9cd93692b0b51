"""A dataset of draws holds the bits of `sample`, however many processes drew it and however often they were stopped."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from distsbi.environment import device_name
from distsbi.files import TRIES, one_holder
from distsbi.processes.meeting import free_port
from distsbi.sampling import SolveError, Tile, dataset
from distsbi.sampling.run import versions
from tests.gaussian import gaussian_posterior, random_mlp_posterior

pytestmark = pytest.mark.optimised

X = np.full((1, 3, 1), 0.3, np.float32)
TILE = Tile(4, 64)


def values(folder) -> np.ndarray:
    """Draws [n, parameters] of the folder, read as a stranger reads it."""
    table = pq.read_table(folder)
    return np.stack([column.to_numpy() for column in table.columns], 1)


@pytest.fixture(scope="module")
def posterior():
    return random_mlp_posterior({"data": 2}, tile=TILE)


@pytest.fixture(scope="module")
def draws(posterior) -> np.ndarray:
    return posterior.sample(5, X, 1_000)[..., 0]


def test_the_bits_of_sample_on_one_device(tmp_path, draws):
    one = random_mlp_posterior({"data": 1}, tile=TILE)
    done = one.sample_dataset(tmp_path / "draws", 5, X, 1_000, rows_per_part=200)
    assert (done.nsamples, done.drawn, done.parts) == (1_000, 1_000, 4)  # 200 are rounded up to four blocks of 64
    assert sorted(f.name for f in (tmp_path / "draws").glob("*.parquet")) == [f"part-0000{i}.parquet" for i in range(4)]
    np.testing.assert_array_equal(values(tmp_path / "draws"), draws)
    assert done.read().column_names == ["theta_0", "theta_1"]
    assert json.loads((tmp_path / "draws" / "_distsbi.json").read_text())["complete"]


def test_what_is_missing_is_drawn(tmp_path, posterior, draws):
    out = tmp_path / "draws"
    posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=64)
    kept = (out / "part-00003.parquet").stat().st_mtime_ns
    for number in (0, 1, 7, 15):
        (out / f"part-{number:05d}.parquet").unlink()
    (out / ".part-00000.parquet.abc").write_text("half a part")
    done = posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=64)
    assert done.drawn == 3 * 64 + 1_000 % 64
    assert (out / "part-00003.parquet").stat().st_mtime_ns == kept
    assert not (out / ".part-00000.parquet.abc").exists()
    np.testing.assert_array_equal(values(out), draws)
    assert posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=64).drawn == 0


def test_a_part_of_other_draws_is_drawn_again(tmp_path, posterior, draws):
    posterior.sample_dataset(tmp_path / "other", 6, X, 1_000, rows_per_part=256)
    posterior.sample_dataset(tmp_path / "draws", 5, X, 1_000, rows_per_part=256)
    shutil.copy(tmp_path / "other" / "part-00001.parquet", tmp_path / "draws" / "part-00001.parquet")
    (tmp_path / "draws" / "part-00002.parquet").write_bytes(b"PAR1 half of it")
    assert posterior.sample_dataset(tmp_path / "draws", 5, X, 1_000, rows_per_part=256).drawn == 512
    np.testing.assert_array_equal(values(tmp_path / "draws"), draws)


def test_an_altered_part_is_named_and_drawn_again(tmp_path, posterior, draws):
    """One bit of a draw, which a reader without the checksums takes for another draw."""
    out = tmp_path / "draws"
    done = posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=256)
    part = out / "part-00002.parquet"
    content = bytearray(part.read_bytes())
    content[content.index(draws[512:768, 1].tobytes()[:64]) + 40] ^= 1
    part.write_bytes(content)
    assert not np.array_equal(values(out), draws)
    with pytest.raises(ValueError, match=r"part-00002.parquet is damaged .*; give the same call again"):
        done.read()
    assert posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=256).drawn == 256
    np.testing.assert_array_equal(values(out), draws)


def test_a_part_that_cannot_be_read_now_is_not_drawn_over(tmp_path, posterior, away):
    out = tmp_path / "draws"
    done = posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=256)
    part = away.path = out / "part-00002.parquet"
    written = part.stat().st_mtime_ns
    for read in (lambda: posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=256), done.read):
        away.times = TRIES
        with pytest.raises(
            OSError, match=r"part-00002.parquet cannot be read now .*Stale file handle.*, which is no damage"
        ):
            read()
    away.times = TRIES - 1
    assert posterior.sample_dataset(out, 5, X, 1_000, rows_per_part=256).drawn == 0
    assert part.stat().st_mtime_ns == written
    part.unlink()
    with pytest.raises(ValueError, match=r"part-00002.parquet .*; give the same call again"):
        done.read()


def test_what_it_was_drawn_on_is_told(tmp_path, posterior, monkeypatch):
    """Each kind of hardware once, also of a call that was killed or had nothing to do."""
    out = tmp_path / "draws"

    def told():
        return json.loads((out / "_distsbi.json").read_text())

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(dataset, "_cut", Mock(side_effect=KeyboardInterrupt))
        posterior.sample_dataset(out, 5, X, 100)
    first = told()["made_on"]
    assert first == [{"device": device_name(jax.devices()[0]), "versions": versions()}]
    assert first[0]["versions"].keys() >= {"distsbi", "jax", "jaxlib", "numpy", "pyarrow"}
    posterior.sample_dataset(out, 5, X, 100)
    assert told()["made_on"] == first
    monkeypatch.setattr(dataset, "device_name", lambda device: "another")
    posterior.sample_dataset(out, 5, X, 100)
    assert told()["made_on"] == first
    (out / "part-00000.parquet").unlink()
    posterior.sample_dataset(out, 5, X, 100)
    assert [one["device"] for one in told()["made_on"]] == [first[0]["device"], "another"]
    assert told()["complete"]


@pytest.mark.parametrize("parts", [3, 100_000, 100_001, 1_000_001])
def test_the_order_of_the_names_is_that_of_the_draws(parts):
    numbers = sorted({0, 9, 10, 99_999, 100_000, parts - 1} & set(range(parts)))
    names = [dataset.part_file(Path(), number, parts).name for number in numbers]
    assert names == sorted(names)


def test_one_call_writes_at_a_time(tmp_path, posterior):
    out = tmp_path / "draws"
    out.mkdir()
    with one_holder(out / dataset.LOCK, out), pytest.raises(ValueError, match=r"is being written by process \d+ on"):
        posterior.sample_dataset(out, 5, X, 100)
    assert posterior.sample_dataset(out, 5, X, 100).drawn == 100


def test_few_draws(tmp_path, posterior):
    """Whose tile is another one."""
    posterior.sample_dataset(tmp_path / "draws", 5, X, 7)
    np.testing.assert_array_equal(values(tmp_path / "draws"), posterior.sample(5, X, 7)[..., 0])


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_processes_share_the_parts(count):
    missing = [0, 1, 2, 5, 7, 8, 9, 12]
    shares = [dataset._share(missing, index, count) for index in range(count)]
    assert [number for share in shares for number in share] == missing
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_other_draws_are_refused(tmp_path, posterior, draws):
    out = tmp_path / "draws"
    posterior.sample_dataset(out, 6, X, 500)
    with pytest.raises(
        ValueError, match=r"differ in seed: given 5, found 6, nsamples: given 1000, found 500\); .* or overwrite=True"
    ):
        posterior.sample_dataset(out, 5, X, 1_000)
    posterior.sample_dataset(out, 5, X, 1_000, overwrite=True)
    np.testing.assert_array_equal(values(out), draws)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no draws of distsbi"):
        posterior.sample_dataset(tmp_path / "other", 5, X, 1_000, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        posterior.sample_dataset(tmp_path / "file", 5, X, 1_000)


def test_an_overwrite_that_is_cut_off_leaves_no_other_draws(tmp_path, posterior, draws, monkeypatch):
    """Of more draws, hence in more parts: stopped as these are removed."""
    out, unlink, removed = tmp_path / "draws", Path.unlink, []
    posterior.sample_dataset(out, 6, X, 1_000, rows_per_part=64)

    def killed(path, **how):
        if path.name.startswith("part-"):
            removed.append(path)
            if len(removed) == 3:
                raise KeyboardInterrupt
        unlink(path, **how)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", killed)
        posterior.sample_dataset(out, 5, X, 256, rows_per_part=64, overwrite=True)
    complete, wrong = dataset.check(out)
    assert not complete
    assert sum("is none of these draws" in (said or "") for said in wrong) >= 10
    done = posterior.sample_dataset(out, 5, X, 256, rows_per_part=64)
    assert (done.drawn, done.parts) == (256, 4)
    np.testing.assert_array_equal(values(out), draws[:256])
    shutil.copy(out / "part-00003.parquet", out / "part-00004.parquet")
    complete, wrong = dataset.check(out)
    assert complete
    assert list(wrong) == [
        *[None] * 4,
        f"{out / 'part-00004.parquet'} is none of these draws, but would be read with them.",
    ]
    assert posterior.sample_dataset(out, 5, X, 256, rows_per_part=64).drawn == 0
    assert dataset.check(out)[0]
    np.testing.assert_array_equal(values(out), draws[:256])


@pytest.mark.parametrize("option", [{"check": 0.1}, {"return_trajectory": True}, {"coupled": True, "solver": "tsit5"}])
def test_options_that_cannot_be_divided(tmp_path, posterior, option):
    with pytest.raises(ValueError, match="can be divided"):
        posterior.sample_dataset(tmp_path / "draws", 5, X, 100, **option)


def test_no_part_has_draws_that_are_not_finite(tmp_path):
    exact = gaussian_posterior({"data": 1}, tile=Tile(2, 64))
    exact.weights.params["matrix"][...] = exact.weights.params["matrix"][...] * np.nan
    with pytest.raises(SolveError):
        exact.sample_dataset(tmp_path / "draws", 5, np.zeros((1, 2, 1)), 300)
    assert list((tmp_path / "draws").glob("*.parquet")) == []


def run_two(words: list[str], change=lambda index: []) -> list[tuple[int, str]]:
    """A command in two processes of two devices: exit code and what was said, of each."""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    address = f"localhost:{free_port()}"
    running = []
    for index in (0, 1):
        where = ["--coordinator", address, "--num-processes", "2", "--process-id", str(index)]
        command = [sys.executable, "-m", "distsbi.cli", *words, *where, *change(index)]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    said = [process.communicate(timeout=240)[0] for process in running]
    return [(process.returncode, text) for process, text in zip(running, said, strict=True)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, posterior):
    path = tmp_path_factory.mktemp("run") / "run"
    posterior.save(path)
    return path


@pytest.mark.cpus
@pytest.mark.timeout(600)
@pytest.mark.long
def test_two_processes_draw_what_one_device_draws(run, tmp_path, monkeypatch):
    """In two halves of the parts, one each; the bits are those of another process with one device."""
    out, words = tmp_path / "draws", ["sample", str(run), "--x", "0.3,0.3,0.3", "--nsamples", "300000", "--seed", "5"]
    words += ["--solver", "euler", "--steps", "2"]
    (first, said), (second, quiet) = run_two([*words, "--out", str(out)])
    assert (first, second) == (0, 0), said + quiet
    assert "300,000 draws in 3 parts" in said
    assert "draws" not in quiet  # the others are silent
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    one = [sys.executable, "-m", "distsbi.cli", *words, "--out", str(tmp_path / "one.npy")]
    subprocess.run(one, env=env, check=True, capture_output=True, timeout=240)
    np.testing.assert_array_equal(values(out), np.load(tmp_path / "one.npy")[..., 0])


@pytest.mark.cpus
@pytest.mark.timeout(600)
@pytest.mark.long
def test_processes_that_ask_for_different_draws(run, tmp_path):
    words = ["sample", str(run), "--x", "0.3,0.3,0.3", "--nsamples", "1000", "--out", str(tmp_path / "draws")]
    for code, said in run_two(words, lambda index: ["--seed", str(index)]):
        assert code == 2
        assert "differ in seed; give all of them the same run and the same command" in said
    assert not (tmp_path / "draws").exists()
