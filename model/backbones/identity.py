"""Identity of a `Spec`'s weights: in tables and reports, and for results computed with them."""

from __future__ import annotations

from pathlib import Path

from model.backbones.variant import Spec
from runtime.digest import digest, digest_files


def spec_digest(spec: Spec) -> str:
    """Return a digest of a spec's weights: of their bytes, or of hub id and revision."""
    if spec.local.exists():
        return digest(spec.model_dump(), digest_files(spec.local))
    return digest(spec.model_dump())


def weights_name(spec: Spec) -> str:
    """Return `<path or hub id>@<digest>`, which changes with the bytes of local weights, or the pinned revision.

    Only the last part of an absolute path is used, so that the name is the same on every machine.
    """
    bytes_of = digest_files(spec.local) if spec.local.exists() else None
    path = Path(spec.path).expanduser()
    name = path.name if path.is_absolute() else spec.path
    return f"{name}@{digest(spec.model_dump(exclude={'path'}), bytes_of)[:12]}"
