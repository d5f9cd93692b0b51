"""Compiled programs on disk, so that the next process of this machine need not compile them again."""

import hashlib
import importlib.metadata
import os
import platform
import sys
from pathlib import Path

from distsbi.environment import cpu_lines

FOLDER, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"  # as jax reads them
CHOSEN = "DISTSBI_COMPILATION_CACHE_DIR"  # what this module has set, and nobody else
LEAST_SECONDS = 0.2
PROCESSOR = ("model name", "flags", "Features", "CPU part")  # of /proc/cpuinfo


def use_compile_cache() -> None:
    """Keeps this process' programs in `distsbi` of the user's cache folder, for a command or a worker, whose process is its own.

    The folder is named by the processor, jax and the number of threads: one home folder may be shared by machines on which each other's
    programs would crash, and XLA divides the loops of a CPU among threads when it compiles, which jax's own keys leave out.
    JAX_COMPILATION_CACHE_DIR, where the user has set it, is left alone; set to nothing, no programs are kept.
    """
    jax = sys.modules.get("jax")
    ours = os.environ.get(CHOSEN)  # by the process that started this one, such as the driver of a worker
    if os.environ.get(FOLDER, ours) != ours:
        return
    if jax is not None and jax.config.values["jax_compilation_cache_dir"] not in (None, "", ours):
        return
    facts = [platform.machine(), importlib.metadata.version("jaxlib"), *cpu_lines(PROCESSOR), f"{_threads()} threads"]
    name = f"jax-{hashlib.blake2b(''.join(facts).encode(), digest_size=8).hexdigest()}"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distsbi" / name
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):  # no home, or one that cannot be written to
        return
    os.environ[FOLDER] = os.environ[CHOSEN] = str(folder)  # read where jax is imported
    os.environ.setdefault(LEAST, str(LEAST_SECONDS))
    if jax is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", float(os.environ[LEAST]))


def _threads() -> str:
    """Threads of XLA on CPUs."""
    return os.environ.get("PJRT_NPROC") or str(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    )
