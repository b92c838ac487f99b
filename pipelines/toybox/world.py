"""What can be seen in the embedded world, and its captions.

An image is a subject (who), a view (from where) and a look (how: scene, style, shape, accessory). Each of them is a
frozen value, sampled from a numpy generator, so an image is a pure function of three small records.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch

from pipelines.toybox.rendering import accessories, scenes, sdf, styles, surface
from pipelines.toybox.rendering.march import View
from pipelines.toybox.rendering.render import Form, Rendered, RenderItem, Rgb, Texture, render_shots

FAMILIES = tuple(sdf.FAMILIES)
COLOURS = tuple(surface.COLOURS)
PATTERNS = tuple(surface.PATTERNS)
SCENES = tuple(name for name in scenes.SCENES if name != scenes.BLANK)
STYLES = tuple(styles.STYLES)
ACCESSORIES = tuple(accessories.ACCESSORIES)
SHAPES = ("ball", "box", "can", "cone", "ring", "gem")
"""Families whose shape can take another family's texture."""

NEAR = 30.0
"""Degrees within which two azimuths count as one pose: photos of an evaluation subject are 72 apart."""

HELD_OUT_SHARE = 8
"""One in this many combinations of family, main colour and pattern belongs to held-out subjects."""

Detail = Literal["full", "colour", "noun"]


@dataclass(frozen=True)
class Toy:
    """One individual.

    proportions: four numbers in [0, 1], read by the family's distance function. colours: names of the main colour, of
    the pattern's colour and of the detail's; rgb: the same with the individual's jitter, sRGB in [0, 1]. scale,
    phase: of the pattern, in [0, 1).
    """

    family: str
    proportions: tuple[float, float, float, float]
    colours: tuple[str, str, str]
    rgb: tuple[Rgb, Rgb, Rgb]
    pattern: str
    scale: float
    phase: float

    @property
    def live(self) -> bool:
        """Whether DreamBench's live prompts apply."""
        return sdf.FAMILIES[self.family].live


@dataclass(frozen=True)
class Look:
    """How the subject is shown. shape: a family whose form it takes, or None. seed: of the scene's own variation."""

    scene: str
    style: str = "photo"
    shape: str | None = None
    accessory: str | None = None
    seed: int = 0


Item = tuple[Toy, View, Look]
"""What an image shows."""


def shot(item: Item) -> RenderItem:
    """What the renderer needs of an item."""
    subject, view, look = item
    family = sdf.FAMILIES[look.shape or subject.family]
    main, second, third = subject.rgb
    form = Form(
        kind=look.shape or subject.family,
        parts=family.parts,
        numbers=subject.proportions,
        anchors=family.anchors(subject.proportions),
        palette={sdf.BODY: main, sdf.DETAIL: third, sdf.PALE: (0.86, 0.86, 0.84), sdf.DARK: (0.06, 0.06, 0.07)},
        texture=Texture(subject.pattern, second, subject.scale, subject.phase, family.waist)
        if subject.pattern != "plain"
        else None,
    )
    return RenderItem(form, view, look.scene, look.style, look.accessory, look.seed)


def render(items: Sequence[Item], size: int = 64, device: torch.device | str = "cpu") -> Rendered:
    """Render every item as an image of size x size pixels."""
    return render_shots([shot(item) for item in items], size, device)


def held_out(subject: Toy) -> bool:
    """Whether the subject is reserved for evaluation: one in eight combinations of family, main colour and pattern is.

    The combinations are spread evenly: every family, colour and pattern occurs both among the reserved and the others.
    """
    places = FAMILIES.index(subject.family), COLOURS.index(subject.colours[0]), PATTERNS.index(subject.pattern)
    return (places[0] + 3 * places[1] + 5 * places[2]) % HELD_OUT_SHARE == 0


def _jitter(name: str, rng: np.random.Generator) -> Rgb:
    """The named colour with a small change of hue, saturation and value."""
    dh, ds, dv = (float(v) for v in rng.uniform(-1, 1, 3))
    hue, saturation, value = colorsys.rgb_to_hsv(*surface.COLOURS[name])
    if saturation > 0.15:
        hue, saturation = (hue + 0.014 * dh) % 1, saturation * (1 + 0.06 * ds)
    value = value * (1 + 0.05 * dv)
    r, g, b = colorsys.hsv_to_rgb(hue, min(saturation, 1.0), min(value, 1.0))
    return (round(r, 4), round(g, 4), round(b, 4))


def _contrast(a: str, b: str) -> float:
    x, y = np.array(surface.COLOURS[a]), np.array(surface.COLOURS[b])
    return float(np.sqrt(((x - y) ** 2 * (0.9, 1.6, 0.5)).sum()))


def _draw(rng: np.random.Generator, family: str | None) -> Toy:
    family = family or FAMILIES[rng.integers(len(FAMILIES))]
    main = COLOURS[rng.integers(len(COLOURS))]
    others = [c for c in COLOURS if _contrast(main, c) > 0.6]
    second = others[rng.integers(len(others))]
    others = [c for c in COLOURS if min(_contrast(main, c), _contrast(second, c)) > 0.35]
    third = others[rng.integers(len(others))]
    if family == "duck" and rng.random() < 0.7:
        third = "orange" if main != "orange" else "yellow"
    names = (main, second, third)
    a, b, c, d, scale, phase = (round(float(v), 4) for v in rng.random(6))
    rgb = (_jitter(main, rng), _jitter(second, rng), _jitter(third, rng))
    return Toy(
        family,
        (a, b, c, d),
        names,
        rgb,
        PATTERNS[rng.integers(len(PATTERNS))],
        scale,
        phase,
    )


def sample_subject(rng: np.random.Generator, family: str | None = None, kept: bool | None = None) -> Toy:
    """A random individual, of the given family if any.

    kept: True gives only held-out subjects, False only the others, None any.
    """
    while True:
        subject = _draw(rng, family)
        if kept is None or held_out(subject) == kept:
            return subject


def sample_view(rng: np.random.Generator, azimuth: float | None = None) -> View:
    """A random view of the whole subject, never cut off by the border; azimuth in degrees, random if None."""
    azimuth = float(rng.uniform(-180, 180)) if azimuth is None else azimuth
    size = float(rng.uniform(0.80, 0.98))
    room = (1 - size) / 2
    return View(
        azimuth=round(azimuth, 4),
        elevation=round(float(rng.uniform(8, 42)), 4),
        roll=round(float(rng.normal(0, 3)), 4),
        size=round(size, 4),
        position=(
            round(float(rng.uniform(-room, room)), 4),
            round(float(rng.uniform(-room, room)), 4),
        ),
        light=(
            round(azimuth + float(rng.uniform(-65, 65)), 4),
            round(float(rng.uniform(30, 65)), 4),
        ),
    )


def sample_look(
    rng: np.random.Generator,
    scene: str | None = None,
    style: float = 0.0,
    shape: float = 0.0,
    accessory: float = 0.0,
    family: str | None = None,
) -> Look:
    """A random look. style, shape, accessory: probabilities that the look has one (0: a plain photo of the subject).

    family: the subject's own, which is excluded as a shape.
    """
    scene = scene or SCENES[rng.integers(len(SCENES))]
    chance, which = rng.random(3), rng.integers(0, 2**31, 3)
    shapes = [s for s in SHAPES if s != family]
    return Look(
        scene=scene,
        style=STYLES[1 + which[0] % (len(STYLES) - 1)] if chance[0] < style else "photo",
        shape=shapes[which[1] % len(shapes)] if chance[1] < shape else None,
        accessory=ACCESSORIES[which[2] % len(ACCESSORIES)] if chance[2] < accessory else None,
        seed=int(rng.integers(2**31)),
    )


def widest(look: Look) -> float:
    """The largest azimuth, in degrees to either side of the front, at which all of a look can be seen.

    180, all around, unless the subject wears something on its face.
    """
    return 50.0 if look.accessory and accessories.ACCESSORIES[look.accessory].anchor == "face" else 180.0


TEMPLATES = (
    "{style} {thing}{wearing} {scene}",
    "{plain_style} {thing}{wearing} {scene}",
    "{style} {with_thing}{wearing} {scene}",
    "{scene}, {plain_style} {thing}{wearing}",
)
"""Caption variants; the first is the default. {plain_style} leaves out "a photo of"; {with_thing} names the pattern's
colour ("a red mug with white stripes")."""


def article(words: str) -> str:
    """Words with "a" or "an" before them."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def caption(
    subject: Toy,
    look: Look,
    variant: int = 0,
    detail: Detail = "full",
    rng: np.random.Generator | None = None,
) -> str:
    """A caption in a small closed vocabulary; the family's name is always a separate word.

    variant: which template, modulo their number (drawn from `rng` if one is given). detail: "full" names main colour
    and pattern, "colour" only the colour, "noun" neither.
    """
    if rng is not None:
        variant = int(rng.integers(len(TEMPLATES)))
    pattern = surface.PATTERNS[subject.pattern]
    noun = f"{look.shape} shaped {{}}{subject.family}" if look.shape else f"{{}}{subject.family}"
    words = {
        "full": f"{subject.colours[0]} {pattern.word} " if subject.pattern != "plain" else f"{subject.colours[0]} ",
        "colour": f"{subject.colours[0]} ",
        "noun": "",
    }[detail]
    thing = with_thing = article(noun.format(words))
    if detail == "full" and pattern.noun:
        with_thing = article(noun.format(f"{subject.colours[0]} ")) + f" with {subject.colours[1]} {pattern.noun}"
    prefix = styles.STYLES[look.style].phrase
    wearing = f" wearing {worn(look.accessory)}" if look.accessory else ""
    template = TEMPLATES[variant % len(TEMPLATES)]
    text = template.format(
        style=prefix,
        plain_style="" if look.style == "photo" else prefix,
        thing=thing,
        with_thing=with_thing,
        wearing=wearing,
        scene=scenes.SCENES[look.scene].phrase,
    )
    return " ".join(text.split())


def worn(accessory: str) -> str:
    """An accessory as something to wear: "a hat", but "glasses"."""
    return accessory if accessory.endswith("s") else article(accessory)


def apart(a: float, b: float) -> float:
    """Degrees between two azimuths, 0..180."""
    return abs((a - b + 180) % 360 - 180)


def undressed(look: Look) -> Look:
    """The same scene as a plain photo of the subject in its own shape."""
    return replace(look, style="photo", shape=None, accessory=None)


VOCABULARY: tuple[str, ...] = tuple(
    sorted(
        set(
            chain.from_iterable(
                phrase.replace(",", " ,").split()
                for phrase in (
                    *FAMILIES,
                    *COLOURS,
                    *ACCESSORIES,
                    *(row.word for row in surface.PATTERNS.values()),
                    *(row.noun for row in surface.PATTERNS.values() if row.noun),
                    *(row.phrase for row in scenes.SCENES.values()),
                    *(row.phrase for row in styles.STYLES.values()),
                    "a an with wearing shaped ,",
                )
            )
        )
    )
)
"""Every word (and the comma) a caption can contain, sorted; captions are lower case."""
