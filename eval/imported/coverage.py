"""Whether images made elsewhere are those that the protocol asks for, and those that other methods have."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping

from eval.imported.listing import first_of
from eval.imported.names import Names
from eval.protocol import protocol
from runtime.errors import UserError

Question = tuple[str, str, int, str]
"""subject_id, group, prompt_id and prompt."""


def questions(asked: Iterable[protocol.Asked]) -> Counter[Question]:
    """Return how many images each prompt of each subject has, without pairs."""
    return Counter(question[:4] for question in asked if question[1] != protocol.PAIR)


def editing(found: Iterable[Question]) -> set[Question]:
    """Return the questions without the reconstruction prompt, which need not be asked."""
    return {question for question in found if question[1] != protocol.RECONSTRUCTION}


def remarks(found: Mapping[Question, int], names: Names) -> Iterator[str]:
    """Yield sentences on what a method's images lack; `found`: images of each question."""
    there = {subject_id for subject_id, *_ in found}
    lacking = [subject_id for subject_id in names.subjects if subject_id not in there]
    if lacking:
        yield f"incomplete: no image of {len(lacking)} of {len(names.subjects)} subjects: {first_of(lacking)}"
    missed = []
    total = 0
    for subject_id in sorted(there):
        wanted = [prompt for prompt in names.prompts[subject_id] if prompt.wanted]
        asked = {(group, number) for subject, group, number, _ in found if subject == subject_id}
        total += len(wanted)
        missed += [f"'{p.text}' of {subject_id}" for p in wanted if (p.group, p.prompt_id) not in asked]
    if missed:
        yield f"incomplete: no image of {len(missed)} of {total} prompts: {first_of(missed)}"
    counts = Counter(found[question] for question in editing(found))
    if len(counts) > 1:
        most = counts.most_common(1)[0][0]
        odd = [f"{found[q]} of '{q[3]}' ({q[0]})" for q in sorted(editing(found)) if found[q] != most]
        yield f"uneven: {most} images of most prompts, but {first_of(odd)}"
    if not any(group == protocol.RECONSTRUCTION for _, group, *_ in found):
        yield "no reconstruction images, so the R- columns are empty"


def check_same(method: str, own: Collection[Question], other: str, others: Collection[Question]) -> None:
    """Raise UserError unless two methods have images of the same prompts of the same subjects."""
    lacks, adds = sorted(editing(others) - editing(own)), sorted(editing(own) - editing(others))
    told = [
        f"{verb} {len(found)}: " + first_of([f"'{prompt}' of {subject_id}" for subject_id, _, _, prompt in found])
        for verb, found in (("lacks", lacks), ("adds", adds))
        if found
    ]
    if told:
        raise UserError(
            f"the images of {method} are of other prompts than those of {other} ({' and '.join(told)}), so they cannot "
            f"share a table; complete them, or score them in a data folder of their own"
        )
