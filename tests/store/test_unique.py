"""Ids that occur twice, found in bounded memory."""

import numpy as np
import pyarrow as pa
import pytest

from distsbi.store import unique


@pytest.mark.parametrize("most", [10, 2**23])
@pytest.mark.parametrize("kind", ["int", "uint", "str", "bytes"])
def test_repeated_ids_are_found(monkeypatch, most, kind):
    monkeypatch.setattr(unique, "PASS_IDS", most)
    values = np.random.default_rng(0).permutation(200).tolist()
    values += [7, 7, 150]
    make = {"int": lambda v: v - 100, "uint": lambda v: v + 2**63, "str": str, "bytes": lambda v: str(v).encode()}[kind]
    ids = pa.array([make(v) for v in values], pa.uint64() if kind == "uint" else None)
    chunks = lambda: [ids.slice(start, 13) for start in range(0, len(ids), 13)]  # noqa: E731
    assert dict(unique.repeated(chunks, len(ids))) == {make(7): 3, make(150): 2}
    assert unique.repeated(lambda: [ids.slice(0, 200)], 200) == []


def test_a_hash_that_two_ids_share_is_no_repetition(monkeypatch):
    monkeypatch.setattr(unique, "_hashes", lambda ids: np.zeros(len(ids), np.uint64))
    ids = pa.array(["a", "b", "c", "b"])
    assert unique.repeated(lambda: [ids], 4) == [("b", 2)]
