"""Licences of photos: one name for each, what it asks, and whether it allows what a run is for.

The column `licence` of frames has the SPDX id (https://spdx.org/licenses) where the licence is known here, otherwise
what the source calls it, and null where the source says nothing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines import tables

UNKNOWN = "unknown"
"""Stands for a licence that is not known, in counts and in `curate.licences`."""
CELEBA = "LicenseRef-CelebA"
"""CelebA's agreement: non-commercial research, no copies for others (https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html)."""


@dataclass(frozen=True)
class Terms:
    """What a licence asks, besides the author's name.

    Attributes:
        non_commercial: no commercial use.
        no_derivatives: changed photos, such as crops and cut-outs, may not be passed on.
        no_copies: photos may not be passed on at all.
        share_alike: changed photos may be passed on under the same licence only.
    """

    non_commercial: bool = False
    no_derivatives: bool = False
    no_copies: bool = False
    share_alike: bool = False

    def text(self) -> str:
        """The terms in words."""
        words = {
            "not for commercial use": self.non_commercial,
            "changed photos may not be passed on": self.no_derivatives,
            "photos may not be passed on": self.no_copies,
            "changed photos under the same licence": self.share_alike,
        }
        return "; ".join(text for text, holds in words.items() if holds) or "no such limits"


FREE = Terms()
OTHERS: dict[str, Terms] = {
    "CC0-1.0": FREE,
    "CC-PDM-1.0": FREE,
    "LicenseRef-US-Government-Work": FREE,
    "Apache-2.0": FREE,
    "MIT": FREE,
    CELEBA: Terms(non_commercial=True, no_copies=True),
}
"""Known licences other than those of Creative Commons with conditions, whose ids say them."""

_CC_URL = re.compile(
    r"(?:https?://)?(?:www\.)?creativecommons\.org/(licenses|publicdomain)/([a-z-]+)/(\d\.\d)(?:/([a-z]+)(?=/|$))?"
)
_CC_ID = re.compile(r"CC-BY((?:-(?:NC|ND|SA))*)(?:-(\d\.\d)(?:-[A-Z]+)?)?")
_PARTS = (
    ("NC", r"non-?\s?commercial|nc"),
    ("ND", r"no-?\s?deriv(?:ative)?s?(?: works)?|nd"),
    ("SA", r"share-?\s?alike|sa"),
)
_WORDS = re.compile(
    r"\b(?:creative commons|cc|licen[cs]ed?|attribution|by|international|generic|unported|public|v|the|under)\b"
)
_TAIL = r"(?:[\s-]*(?:v?1\.0|universal|licen[cs]e|public domain dedication|\(cc0\)))*"
_SPELLINGS = (
    (re.compile(rf"(?:(?:cc|creative commons)[\s-]*(?:zero|0)|public domain dedication){_TAIL}"), "CC0-1.0"),
    (re.compile(rf"(?:cc[\s-]*pdm|public domain mark){_TAIL}"), "CC-PDM-1.0"),
    (
        re.compile(r"(?:https?://www\.usa\.gov/government-works/?|(?:united states|u\.?s\.?) government works?)"),
        "LicenseRef-US-Government-Work",
    ),
)


def normalised(text: str | None) -> str | None:
    """Return the SPDX id of a licence named by a URL of Creative Commons, an id or a common spelling.

    Another text is returned as it is, on one line, and an empty one as None. A licence of Creative Commons without a
    version, as Flickr writes them, has an id without one: `CC-BY-NC`.
    """
    line = " ".join((text or "").split())
    lower = line.lower()
    if found := _CC_URL.match(lower):
        kind, parts, version, place = found.groups()
        if kind == "publicdomain":
            return {"zero": "CC0-1.0", "mark": "CC-PDM-1.0"}.get(parts, line)
        code = _CC_ID.fullmatch(f"CC-{parts}".upper())
        if code is None:
            return line
        place = "" if place in (None, "legalcode", "deed") else place.upper()
        return "-".join(part for part in (_cc(code[1]), version, place) if part)
    for known in OTHERS:
        if lower in (known.lower(), f"{known} license".lower()):
            return known
    for pattern, name in _SPELLINGS:
        if pattern.fullmatch(lower):
            return name
    return _spelled(lower) or line or None


def attribution(author: str | None, url: str | None) -> str | None:
    """Return whom to name for a photo and where it is from, on one line; None where neither is known."""
    return ", ".join(text for part in (author, url) if (text := " ".join((part or "").split()))) or None


def terms(licence: str | None) -> Terms | None:
    """Return what a normalised licence asks; None if it is not known here."""
    if licence is None:
        return None
    if found := _CC_ID.fullmatch(licence):
        parts = found[1].split("-")
        return Terms("NC" in parts, "ND" in parts, False, "SA" in parts)
    return OTHERS.get(licence)


def allowed(licence: str | None, patterns: Sequence[str]) -> bool:
    """Whether a normalised licence matches one of `patterns`: names as `normalised` reads them, `unknown`, or either
    with `*`, such as `CC-BY-*`; in any case."""
    name = (licence or UNKNOWN).lower()
    return any(
        fnmatchcase(name, (pattern if "*" in pattern else normalised(pattern) or "").lower()) for pattern in patterns
    )


def warning(counts: Mapping[str, int], purpose: str, shared: bool = False, unit: str = "photos") -> str | None:
    """Return one sentence that lists the licences which do not allow a purpose, with their counts; None if all do.

    Licences that are not known are no objection; a commercial purpose names them.

    Args:
        counts: by normalised licence, or UNKNOWN.
        purpose: `run.purpose`.
        shared: whether photos are passed on, changed, as an export does.
    """
    against, open_ = [], []
    for licence, count in sorted(counts.items()):
        found = terms(licence)
        if found is None:
            open_.append(f"{count} {licence}")
        elif (found.non_commercial and purpose == "commercial") or (
            shared and (found.no_derivatives or found.no_copies)
        ):
            against.append(f"{count} {licence} ({found.text()})")
    use = f"run.purpose {purpose}" + (" and passing them on" if shared else "")
    texts = []
    if against:
        texts.append(
            f"the licences of these {unit} do not allow {use}: {', '.join(against)}; curate.licences leaves them out"
        )
    if open_ and purpose == "commercial":
        texts.append(f"it is not known here what those of {', '.join(open_)} allow; name the licence with their source")
    return f"warning: {'; '.join(texts)}" if texts else None


@dataclass
class LicensedPhotos:
    """Photos of one source under one licence.

    Attributes:
        licence: normalised, or UNKNOWN.
        attributions: of the photos, empty where it is not known; two of them if they differ.
    """

    source: str
    licence: str
    photos: int = 0
    attributions: set[str] = field(default_factory=set)

    def plain(self) -> dict[str, Any]:
        """Return the values as JSON-like data; `attribution` is that of all photos, None if they differ."""
        only = next(iter(self.attributions)) if len(self.attributions) == 1 else ""
        return {"source": self.source, "licence": self.licence, "photos": self.photos, "attribution": only or None}


def of_frames(data: Path, triplets: bool = False) -> list[LicensedPhotos]:
    """Count the photos in the tables of `data` by source and licence, sorted.

    Args:
        triplets: only photos that a triplet names.
    """
    used = _used(data) if triplets else None
    found: dict[tuple[str, str], LicensedPhotos] = {}
    for chunk in tables.stream(data / "curate", "frames", ["frame_id", "source", "licence", "attribution"]):
        part = chunk if used is None else chunk.filter(pc.is_in(chunk["frame_id"], used))
        groups = part.group_by(["source", "licence", "attribution"]).aggregate([([], "count_all")])
        for row in groups.to_pylist():
            key = (row["source"], row["licence"] or UNKNOWN)
            one = found.setdefault(key, LicensedPhotos(*key))
            one.photos += row["count_all"]
            if len(one.attributions) < 2:
                one.attributions.add(row["attribution"] or "")
    return [found[key] for key in sorted(found)]


def by_licence(photos: Sequence[LicensedPhotos]) -> Counter[str]:
    """Return how many photos have which licence, over all sources."""
    counts = Counter[str]()
    for one in photos:
        counts[one.licence] += one.photos
    return counts


def _used(data: Path) -> pa.Array:
    """Return the frame_ids that triplets name."""
    roles = ("reference", "positive", "target")
    parts = [pc.unique(chunk[role]) for chunk in tables.stream(data / "pairs", "triplets", roles) for role in roles]
    return pc.unique(pa.concat_arrays(parts)) if parts else pa.array([], pa.string())


def _spelled(text: str) -> str | None:
    """Return the id of a licence of Creative Commons in words, such as `Attribution-NonCommercial 4.0`."""
    if not re.match(r"(?:creative commons|cc|attribution)\b", text) or not re.search(r"\b(?:by|attribution)\b", text):
        return None
    rest, parts = text, ""
    for part, pattern in _PARTS:
        rest, times = re.subn(rf"\b(?:{pattern})\b", " ", rest)
        parts += f"-{part}" * bool(times)
    version = re.search(r"\b\d\.\d\b", rest)
    rest = _WORDS.sub(" ", rest[: version.start()] + rest[version.end() :] if version else rest)
    if rest.strip(" -,()"):
        return None  # a place, a condition: not what the id says
    return "-".join(part for part in (_cc(parts), version and version[0]) if part)


def _cc(parts: str) -> str:
    """Return `CC-BY` with its parts (`-NC-SA`) in SPDX's order."""
    return "CC-BY" + "".join(f"-{part}" for part in ("NC", "ND", "SA") if part in parts.split("-"))
