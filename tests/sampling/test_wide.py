"""Where JAX's 64-bit numbers are on, all is computed in float32 as without them, from the same random numbers."""

import os
import subprocess
import sys

import numpy as np
import pytest

from tests.sampling.wide import numbers


@pytest.mark.long
def test_64_bit_numbers_change_nothing(tmp_path):
    command = [sys.executable, "-W", "error::FutureWarning", "-m", "tests.sampling.wide", str(tmp_path / "wide.npz")]
    env = {**os.environ, "JAX_ENABLE_X64": "1"}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) as process:
        expected = numbers()
        assert process.wait(240) == 0, process.stderr.read()[-2000:]  # type: ignore[union-attr]
    with np.load(tmp_path / "wide.npz") as wide:
        assert set(wide.files) == set(expected)
        for name, value in expected.items():
            assert wide[name].dtype == value.dtype, name
            np.testing.assert_allclose(wide[name], value, atol=1e-4, rtol=1e-3, err_msg=name)
