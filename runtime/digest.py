"""Content digests of JSON-like values and of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(*values: Any) -> str:
    """Return 16 hex digits that identify JSON-like values."""
    text = json.dumps(values, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def digest_files(*paths: Path) -> str:
    """Return 16 hex digits that identify the bytes of files, and of all files in folders except Python caches."""
    state = hashlib.blake2b(digest_size=8)
    for path in paths:
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            if "__pycache__" not in file.parts:
                state.update(str(file.relative_to(path.parent)).encode())
                with file.open("rb") as stream:
                    state.update(hashlib.file_digest(stream, "blake2b").digest())
    return state.hexdigest()
