"""The kind of hardware on which something was computed: bits depend on it, so what is written says it."""

import platform
from pathlib import Path
from typing import Any


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
