"""Where something was computed, the kind of hardware and the versions of packages: bits depend on both, so what is written says them."""

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

PACKAGES = ("distsbi", "jax", "jaxlib", "flax", "optax", "diffrax", "orbax-checkpoint", "ray", "pyarrow", "numpy")
OF_BITS = ("distsbi", "jax", "jaxlib")


def versions() -> dict[str, str]:
    """Of Python and the packages that take part in training, sampling and writing."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def bit_versions() -> dict[str, str]:
    """Of the packages that decide, beside the hardware, the bits of draws."""
    return {name: _version(name) for name in OF_BITS}


def _version(package: str) -> str:
    if package == "distsbi":  # also where its source is on the path and it is not installed
        import distsbi

        return distsbi.__version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def device_name(device: Any) -> str:
    """The kind of hardware, on which bits depend: "cuda: NVIDIA H100"; of CPUs the model, and whether it has AMX."""
    if device.platform != "cpu":
        return f"{device.platform}: {device.device_kind}"
    lines = cpu_lines(("model name", "CPU part"))
    model = lines[0].split(":", 1)[1].strip() if lines else platform.machine()
    return f"cpu: {model}{', AMX' if any(' amx_bf16' in line for line in cpu_lines(('flags',))) else ''}"


def cpu_lines(wanted: tuple[str, ...]) -> list[str]:
    """The different lines of /proc/cpuinfo that begin so; none where there is no such file."""
    path = Path("/proc/cpuinfo")
    return sorted({line for line in path.read_text().splitlines() if line.startswith(wanted)}) if path.exists() else []
