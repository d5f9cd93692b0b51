"""What JAX compiles while something runs."""

import contextlib
from collections.abc import Iterator

import jax


class Compilations:
    """Counts programs compiled (or fetched from the compilation cache) while it is entered."""

    def __init__(self):
        self.programs = 0

    def _heard(self, event, *args, **kwargs):
        if self.on and event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1

    def __enter__(self):
        self.on = True
        jax.monitoring.register_event_duration_secs_listener(self._heard)
        return self

    def __exit__(self, *exc):
        self.on = False


@contextlib.contextmanager
def optimised() -> Iterator[None]:
    """What is compiled inside is compiled as users compile it: for what computes for longer than it compiles, in a file that is not marked so."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)
