"""Small files, written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def replace_text(path: Path, text: str) -> None:
    """Writes `text` under a temporary name, onto the disk, and renames it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    replace_text(path, json.dumps(content, indent=1) + "\n")
