"""The images the protocol asks of every method, from the tables of curate and mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.protocol import protocol
from runtime.errors import UserError


@dataclass(frozen=True)
class Plan:
    """The images the protocol asks of every method, for the subjects and pairs with a usable reference."""

    subjects: Sequence[protocol.HeldOutSubject]
    """All held-out subjects."""
    singles: Sequence[tuple[protocol.HeldOutSubject, Sequence[protocol.Job]]]
    pairs: Sequence[tuple[protocol.Pair, Sequence[tuple[protocol.Job, ...]]]]

    @property
    def bare(self) -> list[str]:
        """Ids of the subjects without a usable reference."""
        shown = {subject.subject_id for subject, _ in self.singles}
        return [subject.subject_id for subject in self.subjects if subject.subject_id not in shown]

    def id(self, rule: str, side: int) -> str:
        """Return the plan's `protocol.protocol_id`."""
        alone = [job for _, jobs in self.singles for job in jobs]
        together = [job for _, pictures in self.pairs for jobs in pictures for job in jobs]
        return protocol.protocol_id(self.subjects, [*alone, *together], rule, side)


def plan_of(data: Path, params: protocol.ProtocolParams) -> Plan:
    """Return the plan for the tables of curate and mask in `data`.

    Raises:
        UserError: no held-out subject has a usable mask, or the fixed list of references names an unknown subject.
    """
    prompts, subjects = protocol.prompts_by_subject(data), protocol.held_out(data)
    strange = params.references.keys() - {subject.subject_id for subject in subjects}
    if strange:
        raise UserError(
            f"generate.protocol.references names '{min(strange)}', which is not a held-out subject; "
            f"choose from {', '.join(subject.subject_id for subject in subjects[:40])}"
        )
    asked = [
        (subject, protocol.jobs(subject, prompts.get(subject.subject_id, []), params))
        for subject in subjects
        if protocol.references(subject, params)
    ]
    if not asked:
        raise UserError(
            f"none of the {len(subjects)} held-out subjects has a usable mask; see the masks table in {data / 'mask'}"
        )
    chosen = protocol.pairs(subjects, params)
    return Plan(subjects, asked, list(zip(chosen, protocol.pair_jobs(chosen, params), strict=True)))
