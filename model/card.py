"""The model card of an adapter: README.md with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import huggingface_hub
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model.backbones.variant import HUB_ID, first_fault
from model.methods.config import AdapterConfig
from model.repository import COMMIT
from runtime.errors import ModelError

NOT_STATED = "Not stated."
PAPERS = {
    "mfi": ("CustomContrast", "2409.05606"),
    "ip_adapter_plus": ("IP-Adapter-plus", "2308.06721"),
    "realcustom": ("RealCustom", "2403.00483"),
    "realcustom_pp": ("RealCustom++", "2408.09744"),
    "dreamidentity": ("DreamIdentity", "2307.00300"),
}
"""Title of a method and the arXiv number of its paper; one without a row goes by its name."""


class Scores(BaseModel):
    """What an evaluation measured; scores under different protocol ids are not comparable."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocol: str = Field(pattern="^[0-9a-f]{16}$")
    """Protocol id, as in `data/score/protocol.json`."""
    data: str
    """What was evaluated on, such as "DreamBench"."""
    values: dict[str, float] = Field(min_length=1)
    """By metric, as in the report: CT, R-CI, E-CI, R-DI, E-DI ..."""


class About(BaseModel):
    """What training does not know about an adapter; key `about` of card.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    license: str
    """The hub's identifier of the licence, such as `apache-2.0`; the base model's terms apply too."""
    data: str
    """What it was trained on, in a sentence or two."""
    intended_use: str
    """What it is for, and what it is not for."""
    scores: Scores | None = None


def read_about(card: Mapping[str, Any], where: str) -> About | None:
    """`about` of a card.json; None if there is none. Raises ModelError naming `where` and the key."""
    if "about" not in card:
        return None
    try:
        return About.model_validate(card["about"])
    except ValidationError as error:
        raise ModelError(f"{where}: about.{first_fault(error)}; correct or remove it") from error


def model_card(config: AdapterConfig, card: Mapping[str, Any], name: str, source: str | None = None) -> str:
    """The text of README.md.

    Args:
        card: contents of card.json; may be empty.
        name: `owner/name` or the folder from which the adapter will be loaded.
        source: `owner/name@commit` if the adapter was copied from there.

    Raises:
        ModelError: `card["about"]` is invalid.
    """
    about = read_about(card, "card.json")
    title, paper = PAPERS.get(config.encoder, (config.encoder, None))
    linked = f"[{title}](https://arxiv.org/abs/{paper})" if paper else title
    # A local base model has the SHA-256 of its files as its revision.
    is_hub_base = HUB_ID.fullmatch(config.base_model) and COMMIT.fullmatch(config.base_revision or "")
    front = huggingface_hub.ModelCardData(
        base_model=config.base_model if is_hub_base else None,
        base_model_relation="adapter" if is_hub_base else None,
        license=about.license if about else None,
        library_name="customcontrast",
        pipeline_tag="text-to-image",
        tags=["customcontrast", "subject-driven", "personalization", config.encoder.replace("_", "-")],
        model_name=name.rpartition("/")[2],
        eval_results=results(about.scores) if about and about.scores else None,
    )
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name.rpartition('/')[2]}",
        f"An adapter of {linked} for subject-driven text-to-image generation: it reads a photo of a subject, and the"
        f" frozen base model `{config.base_model}` generates that subject as a prompt asks.",
        "## How to load it",
        "In a clone of the open implementation of CustomContrast:",
        f"```python\n{snippet(config, name)}\n```",
        "## Intended use",
        about.intended_use if about else NOT_STATED,
        "## Training",
        about.data if about else NOT_STATED,
        table(training(config, card, source)),
        photos(card.get("photos", [])),
        "## Scores",
        scores_text(about.scores if about else None),
        "## Licence",
        f"`{about.license}`, and the terms of the base model."
        if about
        else f"{NOT_STATED} The terms of the base model apply.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def snippet(config: AdapterConfig, name: str) -> str:
    """Six lines of Python that load the adapter and generate an image."""
    pipeline = "CustomContrastXLPipeline" if len(config.text_widths) > 1 else "CustomContrastPipeline"
    return "\n".join(
        (
            "from PIL import Image",
            f"from model.pipeline import {pipeline}",
            "",
            f'pipeline = {pipeline}.from_pretrained("{config.base_model}", adapter="{name}")',
            'photo = Image.open("mug.jpg")',
            'pipeline("a photo of a mug on the beach", subjects={"mug": photo}).images[0].save("beach.png")',
        )
    )


def training(config: AdapterConfig, card: Mapping[str, Any], source: str | None) -> list[tuple[str, Any]]:
    """Rows of the table of what was trained on what; what is not known is left out."""
    recipe = card.get("recipe", {})
    train = recipe.get("train", {})
    return [
        ("base model", f"`{config.base_model}`"),
        ("its revision", config.base_revision and f"`{config.base_revision}`"),
        ("image encoder", f"`{config.image_encoder}`, layers {', '.join(map(str, config.feature_layers))}"),
        ("resolution, pixels", recipe.get("base", {}).get("resolution")),
        ("method", f"`{config.encoder}`"),
        ("steps", card.get("steps")),
        ("batch over all ranks", train.get("batch")),
        ("learning rate", train.get("learning_rate")),
        ("training triplets", card.get("triplets")),
        ("triplets held out", card.get("triplets_held_out")),
        ("hash of the data", recipe.get("data") and f"`{recipe['data']}`"),
        ("copied from", source and f"`{source}`"),
    ]


def photos(shown: Sequence[Mapping[str, Any]]) -> str:
    """The photos it was trained on, by source and licence; empty if card.json does not have them."""
    if not shown:
        return ""
    lines = ["| photos trained on | source | licence | attribution |", "|---|---|---|---|"]
    for of in shown:
        cells = (of["photos"], f"`{of['source']}`", of["licence"], of["attribution"] or "")
        lines.append(f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def results(scores: Scores) -> list[huggingface_hub.EvalResult]:
    """The scores as the hub's front matter has them."""
    return [
        huggingface_hub.EvalResult(
            task_type="text-to-image",
            dataset_type="subject-driven",
            dataset_name=scores.data,
            dataset_args={"protocol": scores.protocol},
            metric_type=metric.lower(),
            metric_name=metric,
            metric_value=value,
        )
        for metric, value in sorted(scores.values.items())
    ]


def scores_text(scores: Scores | None) -> str:
    """The section on scores."""
    if scores is None:
        return "None recorded."
    return (
        f"{scores.data}, protocol `{scores.protocol}`; scores under another protocol id are not comparable.\n\n"
        + table(sorted(scores.values.items()), ("metric", "score"))
    )


def table(rows: list[tuple[str, Any]], header: tuple[str, str] = ("", "")) -> str:
    """A Markdown table of two columns, without the rows that have no value."""
    lines = [
        f"| {name} | {value} |" for name, value in [header, ("---", "---"), *rows] if value is not None and value != {}
    ]
    return "\n".join(lines)
