"""Questions about captured photos: another view of a capture, against the photo of another that looks most like it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval.protocol.protocol import HeldOutSubject, held_out
from eval.score.scorer import ScoreParams, comparable
from eval.trial.ranking import ALL, Question
from pipelines import tables
from pipelines.photos import poses
from runtime.errors import UserError

FRAME_COLUMNS = ("frame_id", "subject_id", "split", "phash", *poses.POSE_COLUMNS)
SAME_CLASS, OTHER_CLASS = "rival of the same class", "rival of another class"
ANGLE_KNOWN, ANGLE_UNKNOWN = "view angle known", "view angle unknown"
ROWS = (SAME_CLASS, OTHER_CLASS, ANGLE_KNOWN, ANGLE_UNKNOWN, ALL)


@dataclass(frozen=True)
class Captures:
    """Captures with at least two photos whose masks can be compared.

    subjects: their photos are those with such masks. hashes: perceptual hash of each photo, bits [N, 256]. directions:
    unit vector from the subject to the camera [N, 3], NaN where unknown. Photos are numbered over all subjects.
    """

    subjects: tuple[HeldOutSubject, ...]
    hashes: np.ndarray
    directions: np.ndarray

    @property
    def starts(self) -> list[int]:
        """The number of each subject's first photo."""
        return [0, *np.cumsum([len(subject.photos) for subject in self.subjects]).tolist()][:-1]


def read_captures(data: Path, params: ScoreParams, most: int | None) -> Captures:
    """Return the captures in the tables of curate and mask.

    most: of more subjects, this many, evenly spaced in their order.

    Raises:
        TableError: curate or mask has not run.
        UserError: there are not two subjects with two photos and masks each.
    """
    frames = tables.read(data / "curate", "frames", FRAME_COLUMNS)
    able = []
    for split in sorted(set(frames["split"].to_pylist())):
        for subject in held_out(data, split):
            photos = comparable(subject, params)
            if len(photos) > 1:
                able.append(replace(subject, photos=photos))
    if len(able) < 2:
        raise UserError(
            f"{data} has {len(able)} subject(s) with two photos whose mask can be compared, and a trial needs two; "
            f"run curate and mask on more captures, or extend score.photo_quality"
        )
    if most is not None and most < len(able):
        able = [able[number] for number in np.linspace(0, len(able) - 1, most).round().astype(int)]
    starts = np.flatnonzero(tables.changes(frames["subject_id"]))
    directions = poses.viewing_directions(frames, starts)
    place = {frame_id: row for row, frame_id in enumerate(frames["frame_id"].to_pylist())}
    rows = [place[photo.frame_id] for subject in able for photo in subject.photos]
    packed = np.frombuffer(b"".join(frames["phash"].to_pylist()), dtype=np.uint8).reshape(len(place), -1)
    return Captures(tuple(able), np.unpackbits(packed[rows], axis=1), directions[rows])


def questions(captures: Captures, degrees: float) -> list[Question]:
    """Return the questions: each photo with each far view of its subject, and its rival.

    Far views are at least `degrees` from the photo; of a subject without poses, all its other photos. The rival is the
    photo of another subject with the nearest perceptual hash, so in the most similar pose and place: of the same class,
    or of any if the class has no other subject.
    """
    starts = captures.starts
    counts = [len(subject.photos) for subject in captures.subjects]
    owner = np.repeat(np.arange(len(counts)), counts)
    by_class: dict[str, list[int]] = defaultdict(list)
    for number, subject in enumerate(captures.subjects):
        by_class[subject.class_name].append(number)
    signs = captures.hashes.astype(np.float32) * 2 - 1
    found = []
    for number, subject in enumerate(captures.subjects):
        alike = [other for other in by_class[subject.class_name] if other != number]
        rivals = np.flatnonzero(np.isin(owner, alike) if alike else owner != number)
        own = np.arange(starts[number], starts[number] + counts[number])
        nearest = rivals[(signs[own] @ signs[rivals].T).argmax(axis=1)]
        apart, known = _apart(captures.directions[own], degrees)
        rows = (SAME_CLASS if alike else OTHER_CLASS, ANGLE_KNOWN if known else ANGLE_UNKNOWN)
        for query, match in np.argwhere(apart):
            found.append(Question(subject.subject_id, int(own[query]), int(own[match]), int(nearest[query]), rows))
    return found


def _apart(directions: np.ndarray, degrees: float) -> tuple[np.ndarray, bool]:
    """Which photos are far views of each other, bool [n, n], and whether their angles are known."""
    if np.isnan(directions).any(axis=1).all():
        return ~np.eye(len(directions), dtype=bool), False
    return poses.angles(directions[:, None], directions[None]) >= degrees, True


def described(captures: Captures, questions: Sequence[Question]) -> str:
    """Return how many photos of how many subjects and classes the questions are about."""
    asked = {question.subject for question in questions}
    subjects = [subject for subject in captures.subjects if subject.subject_id in asked]
    photos, classes = sum(len(s.photos) for s in subjects), len({s.class_name for s in subjects})
    return f"{photos} photos of {len(subjects)} subjects in {classes} classes"
