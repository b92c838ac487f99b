"""The evaluation protocol: held-out subjects, their reference photos, prompts and seeds, and its id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from eval.protocol import prompts as own_prompts
from model.images.segment import on_white
from pipelines import tables
from pipelines.photos.decode import DecodeError, decode_image
from pipelines.photos.roots import Roots
from runtime.digest import digest
from runtime.errors import UserError
from runtime.params import Section

RECONSTRUCTION = own_prompts.RECONSTRUCTION
RECONSTRUCTION_ID = -1
PAIR = own_prompts.PAIR
"""Group of the images of two subjects, which scores of single subjects exclude."""
PAIR_ID = 10_000
"""First prompt_id of pairs."""


class ProtocolParams(Section):
    """Which images are generated."""

    # The reference: the first photo by id with a usable mask, or each such photo in turn; leave_one_out: each in turn,
    # and images generated from a photo are not compared with it.
    reference: Literal["first", "all", "leave_one_out"]
    references: dict[str, str]  # subject_id: frame_id, a fixed list (Kosmos-G publishes one); overrides the rule
    prompt_set: Literal["source", "groups", "people"]  # those of the prompts table, or of eval/protocol/prompts.yaml
    prompts: int | None = Field(ge=0)  # per subject, spread over the groups; null: all
    images: int = Field(ge=1)  # per prompt and reference
    reconstructions: int = Field(ge=1)  # per reference, of `a photo of a <class>`
    reconstruction: str  # its prompt; {class} is the class noun
    pairs: int = Field(ge=0)  # of held-out subjects, generated together
    seed: int


@dataclass(frozen=True)
class HeldOutPhoto:
    """A kept photo of a subject, with its row of the masks table if any (frame_id, height, width, rle, quality)."""

    frame_id: str
    source: str
    path: str
    sha256: str
    mask: Mapping[str, Any] | None

    @property
    def quality(self) -> str | None:
        """The mask's quality flag; None without a mask."""
        return self.mask["quality"] if self.mask else None

    @property
    def fingerprint(self) -> list[str]:
        """Changes when the photo or its mask changes."""
        rle = self.mask["rle"].hex() if self.mask else ""
        return [self.frame_id, self.sha256, rle]


@dataclass(frozen=True)
class HeldOutSubject:
    """A held-out subject; photos sorted by frame_id."""

    subject_id: str
    class_name: str
    photos: tuple[HeldOutPhoto, ...]


LEAVE_ONE_OUT = "leave_one_out"
"""The rule by which an image is compared only with the photos that are not its references."""


@dataclass(frozen=True)
class Job:
    """One image to generate, seen from one of its subjects.

    index: 0.. among the subject's images of one prompt, over references and repetitions.
    """

    prompt_id: int
    group: str
    prompt: str
    index: int
    seed: int
    reference: HeldOutPhoto


def held_out(data: Path, split: str = "test") -> list[HeldOutSubject]:
    """Return the subjects of a split, in the order of the frames table.

    Raises:
        TableError: curate or mask has not run.
        UserError: no source has that split.
    """
    masks = {row["frame_id"]: row for row in tables.rows(data / "mask", "masks", _MASK_COLUMNS)}
    photos: dict[tuple[str, str], list[HeldOutPhoto]] = {}
    for row in tables.rows(data / "curate", "frames", _FRAME_COLUMNS):
        if row["split"] == split:
            photo = HeldOutPhoto(row["frame_id"], row["source"], row["path"], row["sha256"], masks.get(row["frame_id"]))
            photos.setdefault((row["subject_id"], row["class_name"]), []).append(photo)
    if not photos:
        raise UserError(
            f"{data / 'curate' / 'frames'} holds no photo of split {split}; "
            f"add a source with split: {split} to params.yaml"
        )
    return [
        HeldOutSubject(subject_id, class_name, tuple(members)) for (subject_id, class_name), members in photos.items()
    ]


_FRAME_COLUMNS = ["frame_id", "subject_id", "source", "class_name", "split", "path", "sha256"]
_MASK_COLUMNS = ["frame_id", "height", "width", "rle", "quality"]


def read_protocol(file: Path) -> dict[str, Any]:
    """Return the protocol that the generate stage recorded.

    Raises:
        UserError: the file is missing or malformed.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); run the generate stage again") from None
    if missing := {"id", "protocol"} - found.keys():
        raise UserError(f"{file} has no '{min(missing)}'; run the generate stage again")
    return found


def prompts_by_subject(data: Path) -> dict[str, list[dict[str, Any]]]:
    """Return, by subject_id, the rows of the prompts table, sorted by prompt_id."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in tables.rows(data / "curate", "prompts"):
        found.setdefault(row["subject_id"], []).append(row)
    return found


def references(subject: HeldOutSubject, params: ProtocolParams) -> list[HeldOutPhoto]:
    """Return the reference photos; empty if no photo has a usable mask.

    Raises:
        UserError: the fixed list names a photo that is missing or has no usable mask.
    """
    usable = [photo for photo in subject.photos if photo.quality == "ok"]
    wanted = params.references.get(subject.subject_id)
    if wanted is not None:
        named = [photo for photo in usable if photo.frame_id == wanted]
        if not named:
            raise UserError(
                f"generate.protocol.references names '{wanted}' for {subject.subject_id}, which has no usable mask; "
                f"choose one of {', '.join(photo.frame_id for photo in usable) or 'another subject'}"
            )
        return named
    return usable[:1] if params.reference == "first" else usable


def spread(prompts: Sequence[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    """Return `limit` of the prompts in their order, split evenly over the groups and evenly spaced within each."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in prompts:
        groups.setdefault(row["group"], []).append(row)
    shares = dict.fromkeys(groups, 0)
    while sum(shares.values()) < limit:
        for name, members in groups.items():
            if shares[name] < len(members) and sum(shares.values()) < limit:
                shares[name] += 1
    chosen = [
        members[i * len(members) // shares[name]] for name, members in groups.items() for i in range(shares[name])
    ]
    return sorted(chosen, key=lambda row: row["prompt_id"])


def seed_of(seed: int, subject_id: str, prompt_id: int, index: int) -> int:
    """Return the seed of an image's initial noise, 0..2^32 - 1, independent of what else is generated."""
    text = f"{seed}/{subject_id}/{prompt_id}/{index}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def jobs(subject: HeldOutSubject, prompts: Sequence[dict[str, Any]], params: ProtocolParams) -> list[Job]:
    """Return the images to generate of a single subject: the reconstruction prompt first, then the chosen prompts.

    prompts: the subject's rows of the prompts table; replaced by our own with `prompt_set: groups` or `people`.
    """
    shown = references(subject, params)
    rebuild = reconstruction(params)
    result = []
    for row in [rebuild, *spread(listed(subject, prompts, params), params.prompts)]:
        count = params.reconstructions if row is rebuild else params.images
        for index in range(count * len(shown)):
            seed = seed_of(params.seed, subject.subject_id, row["prompt_id"], index)
            result.append(
                Job(row["prompt_id"], row["group"], prompt_of(subject, row), index, seed, shown[index // count])
            )
    return result


def listed(
    subject: HeldOutSubject, prompts: Sequence[dict[str, Any]], params: ProtocolParams
) -> Sequence[dict[str, Any]]:
    """Return the prompts of a subject that the protocol chooses from: its rows of the prompts table, or our own."""
    if params.prompt_set == "people":
        return list(own_prompts.of_people())
    return list(own_prompts.of_class(subject.class_name)) if params.prompt_set == "groups" else prompts


def reconstruction(params: ProtocolParams) -> dict[str, Any]:
    """Return the reconstruction prompt, as a row of the prompts table."""
    return {"prompt_id": RECONSTRUCTION_ID, "group": RECONSTRUCTION, "template": params.reconstruction}


def prompt_of(subject: HeldOutSubject, prompt: Mapping[str, Any]) -> str:
    """Return the text of a row of the prompts table for a subject."""
    text: str = prompt["template"].replace("{class}", subject.class_name)
    return text


Pair = tuple[HeldOutSubject, HeldOutSubject]

Asked = tuple[str, str, int, str, str]
"""What an image was asked for: subject_id, group, prompt_id, prompt, frame_id of the reference ("" if unknown)."""


def pairs(subjects: Sequence[HeldOutSubject], params: ProtocolParams) -> list[Pair]:
    """Return the pairs of subjects generated together; their class nouns differ, so that they can be told apart.

    Subjects in the fewest pairs come first, ties are broken by the seed; fewer pairs are a prefix of more.

    Raises:
        UserError: there are not enough pairs.
    """
    able = [subject for subject in subjects if references(subject, params)] if params.pairs else []
    left = [(a, b) for a, b in combinations(able, 2) if a.class_name != b.class_name]
    if params.pairs > len(left):
        raise UserError(
            f"generate.protocol.pairs is {params.pairs}, and the held-out subjects with a usable mask form {len(left)} "
            f"pairs of different class nouns; set it to at most that"
        )
    uses = {subject.subject_id: 0 for subject in able}

    def rank(pair: Pair) -> tuple[int, int, int]:
        counts = [uses[subject.subject_id] for subject in pair]
        return max(counts), sum(counts), seed_of(params.seed, pair_id(pair), 0, 0)

    chosen = []
    for _ in range(params.pairs):
        best = min(left, key=rank)
        left.remove(best)
        chosen.append(best)
        for subject in best:
            uses[subject.subject_id] += 1
    return chosen


def pair_id(pair: Pair) -> str:
    """Return the id of a pair."""
    return "+".join(subject.subject_id for subject in pair)


def pair_jobs(chosen: Sequence[Pair], params: ProtocolParams) -> list[list[tuple[Job, Job]]]:
    """Return the images to generate of each pair, one job for each of its two subjects: same prompt, same seed.

    A subject's reference is its first. The n-th prompt of the k-th pair has the id PAIR_ID + 100 k + n, so that a
    subject's prompt_id means one text here too.
    """
    result = []
    for k, pair in enumerate(chosen):
        first, second = (references(subject, params)[0] for subject in pair)
        pictures = []
        for n, template in enumerate(own_prompts.of_pairs()):
            text = template.format(a=pair[0].class_name, b=pair[1].class_name)
            number = PAIR_ID + own_prompts.LIST_IDS * k + n
            for index in range(params.images):
                job = Job(number, PAIR, text, index, seed_of(params.seed, pair_id(pair), n, index), first)
                pictures.append((job, replace(job, reference=second)))
        result.append(pictures)
    return result


def protocol_id(subjects: Iterable[HeldOutSubject], asked: Iterable[Job], rule: str, side: int) -> str:
    """Return 16 hex digits that identify the protocol: results with the same id may be compared in one table.

    It covers the id, class noun and bytes of all photos of every held-out subject; the group, prompt, seed and
    reference of every image; the reference rule, which decides what an image is compared with; the side of the images,
    px. It excludes the methods, their weights and sampler, and how scores are measured, which results record beside
    it. Masks are excluded too: they come from Grounded SAM, whose last digits differ between machines.

    Args:
        asked: jobs of all images, including pairs; in any order.
        rule: ProtocolParams.reference.
    """
    pictures = sorted(
        [job.reference.frame_id, job.prompt_id, job.group, job.prompt, job.index, job.seed] for job in asked
    )
    return digest(_photos(subjects), pictures, rule, side)


def prompts_id(subjects: Iterable[HeldOutSubject], asked: Iterable[Asked], leave_out: bool) -> str:
    """Return 16 hex digits that identify what scores of images made elsewhere depend on besides the images.

    It covers the photos as `protocol_id` does, each subject's editing prompts, and the references if images are
    compared only with the other photos. Seeds, the size and number of images, and the reconstruction prompt are not
    ours to set there.

    Args:
        asked: of all images, in any order and as often as they occur.
        leave_out: whether an image is compared only with the photos that are not its references.
    """
    editing = {
        (subject_id, group, number, prompt, reference if leave_out else "")
        for subject_id, group, number, prompt, reference in asked
        if group not in (RECONSTRUCTION, PAIR)
    }
    return digest(_photos(subjects), sorted(editing), leave_out)


def _photos(subjects: Iterable[HeldOutSubject]) -> list[Any]:
    return [
        [subject.subject_id, subject.class_name, [[photo.frame_id, photo.sha256] for photo in subject.photos]]
        for subject in sorted(subjects, key=lambda subject: subject.subject_id)
    ]


def read_photo(roots: Roots, photo: HeldOutPhoto) -> tuple[Image.Image, np.ndarray | None]:
    """Return a photo [RGB] and its mask (bool [H, W]; None without one).

    Raises:
        UserError: the photo is missing or cannot be read.
    """
    try:
        image = decode_image(roots[photo.source].read(photo.path))
    except (FileNotFoundError, DecodeError) as error:
        raise UserError(
            f"photo '{photo.path}' of source {photo.source} cannot be read ({error}); put it back or run curate again"
        ) from None
    if photo.mask is None:
        return image, None
    return image, tables.decode_mask(photo.mask["rle"], photo.mask["height"], photo.mask["width"])


def read_segment(roots: Roots, photo: HeldOutPhoto, margin: float) -> Image.Image:
    """Return the subject of a photo cut out on white, with the photo's id in `info`; the photo must have a mask.

    margin: see `on_white`.
    """
    image, mask = read_photo(roots, photo)
    assert mask is not None
    segment = on_white(image, mask, margin=margin)
    segment.info["frame_id"] = photo.frame_id
    return segment
