"""Put similarity metrics on trial: do they rank another view of a capture above the photo of another that looks most
like it?

Reads the tables of curate and mask under --data; docs/metrics_trial.md explains the result.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tqdm import tqdm

from eval.trial import captures as photos
from eval.trial import ranking, record, scoring
from runtime.cli import read_params
from runtime.errors import UserError

QUESTION = (
    "Is another view of a capture, from {degrees:g} degrees away where the angle is known, more similar than "
    "the photo of another subject whose perceptual hash is nearest?"
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--angle", type=float, default=30.0, help="least angle between two views, degrees (default: %(default)s)"
    )
    parser.add_argument(
        "--subjects", type=int, default=500, help="at most this many, evenly spaced (default: %(default)s)"
    )
    parser.add_argument("--name", help="title of the result (default: the folder of --data)")
    parser.add_argument("--out", type=Path, help="file of the result (default: trial.json in --data)")
    scoring.encoder_options(parser)


def main(options: argparse.Namespace) -> None:
    """Run the trial.

    Raises:
        UserError: an option is out of range, or there is nothing to ask.
    """
    if not 0 <= options.angle < 180 or options.subjects < 2:
        raise UserError("--angle must be in [0, 180) degrees and --subjects at least 2")
    params = read_params(options)
    score = scoring.trial_params(params, options.encoder)
    found = photos.read_captures(params.data, score, options.subjects)
    questions = photos.questions(found, options.angle)
    if not questions:
        raise UserError(
            f"no two views of a subject in {params.data} are {options.angle:g} degrees apart; lower --angle"
        )
    scorer, weights = scoring.load(params, score)
    subjects = tqdm(found.subjects, unit="subject", disable=None)
    vectors = scoring.stacked([scoring.photo_vectors(scorer, subject) for subject in subjects])
    answered = {metric: ranking.answers(of, questions) for metric, of in vectors.items()}
    rows = ranking.table(
        [q.subject for q in questions], [q.rows for q in questions], answered, score.intervals, photos.ROWS
    )
    tables = [{"title": f"{photos.described(found, questions)}.", "rows": rows}]
    name = options.name or params.data.name
    result = scoring.result(name, QUESTION.format(degrees=options.angle), score, weights, tables)
    out = options.out or params.data / "trial.json"
    record.store(result, out)
    print(record.text(result))
    print(f"trial: {out}")
