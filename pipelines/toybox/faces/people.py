"""Who can be seen in the world of faces, how, and the captions that say so.

An image is a person (who), a view (from where) and an outfit (how: expression, clothes, what is worn, scene, style).
Each is a frozen value that is drawn from a numpy generator, so an image is a pure function of three small records.
"""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
from typing import Literal

import numpy as np
import torch

from pipelines.toybox.faces import head
from pipelines.toybox.rendering import scenes, styles, surface
from pipelines.toybox.rendering.accessories import ACCESSORIES, Accessory
from pipelines.toybox.rendering.exact import length
from pipelines.toybox.rendering.march import View
from pipelines.toybox.rendering.render import Form, Rendered, RenderItem, Rgb, render_shots
from pipelines.toybox.rendering.sdf import TRIM, WORN, Parts, Point, cuboid, ellipsoid, slab, torus

SKINS: dict[str, Rgb] = {
    "pale": (0.98, 0.86, 0.78),
    "fair": (0.95, 0.76, 0.62),
    "olive": (0.82, 0.63, 0.42),
    "tan": (0.70, 0.47, 0.28),
    "brown": (0.50, 0.31, 0.18),
    "dark": (0.30, 0.18, 0.11),
}
"""sRGB in [0, 1], as all colours here."""
HAIR_COLOURS: dict[str, Rgb] = {
    "black": (0.09, 0.08, 0.09),
    "brown": (0.40, 0.22, 0.09),
    "blond": (0.95, 0.80, 0.38),
    "red": (0.78, 0.27, 0.08),
    "grey": (0.66, 0.66, 0.68),
    "blue": (0.16, 0.32, 0.86),
}
IRISES: dict[str, Rgb] = {
    "brown": (0.40, 0.20, 0.06),
    "blue": (0.14, 0.45, 0.92),
    "green": (0.16, 0.62, 0.25),
    "grey": (0.50, 0.55, 0.58),
}
BLACK: Rgb = (0.0, 0.0, 0.0)
NOUNS = ("man", "woman")
SCENES = tuple(name for name in scenes.SCENES if name != scenes.BLANK)
STYLES = tuple(styles.STYLES)
CLOTHES = tuple(surface.COLOURS)
HELD_OUT_SHARE = 8
"""One in this many combinations of skin, hair style, hair colour and iris belongs to held-out people."""


def spectacles(p: Point) -> Parts:
    x, y, z = p
    side = x.abs()
    rims = torus(length(side - 0.50, y), z, 0.42, 0.085)
    bridge = cuboid(x, y, z, 0.10, 0.06, 0.06)
    arms = cuboid(side - 1.08, y, z + 0.75, 0.05, 0.06, 0.75)
    return [(WORN, torch.minimum(rims, torch.minimum(bridge, arms)))]


def toque(p: Point) -> Parts:
    x, y, z = p
    r = length(x, z)
    band = slab(r - 0.98, (y - 0.22).abs() - 0.24) - 0.02
    puff = ellipsoid(x, y - 0.85, z, 1.20, 0.52, 1.20)
    return [(WORN, torch.minimum(band, puff))]


def helmet(p: Point) -> Parts:
    x, y, z = p
    dome = torch.maximum(ellipsoid(x, y - 0.02, z, 1.08, 0.92, 1.12), -y)
    brim = slab(length(x, z - 0.12) - 1.30, (y - 0.05).abs() - 0.04) - 0.03
    ridge = slab(x.abs() - 0.14, torch.maximum(length(y, z) - 1.02, -y)) - 0.03
    return [(WORN, torch.minimum(dome, brim)), (TRIM, ridge)]


def pointed(p: Point) -> Parts:
    x, y, z = p
    r = length(x, z)
    cone = slab((r + 0.62 * y - 0.98) * 0.85, (y - 0.78).abs() - 0.80)
    brim = slab(r - 1.40, (y - 0.03).abs() - 0.03) - 0.03
    band = slab((r + 0.62 * y - 1.02) * 0.85, (y - 0.18).abs() - 0.12)
    return [(WORN, torch.minimum(cone, brim)), (TRIM, band)]


@dataclass(frozen=True)
class Uniform:
    """What a job wears: a row of `WARDROBE`, and the colours of garment and collar."""

    hat: str
    garment: Rgb
    collar: Rgb


WARDROBE: dict[str, Accessory] = {
    "hat": ACCESSORIES["hat"],
    "scarf": ACCESSORIES["scarf"],
    "glasses": Accessory(spectacles, "face", (0.10, 0.08, 0.09), (0.10, 0.08, 0.09), ((1.2, 0.5),)),
    "crown": ACCESSORIES["crown"],
    "toque": Accessory(toque, "top", (0.97, 0.97, 0.95), (0.97, 0.97, 0.95), ((1.2, 0.9),)),
    "helmet": Accessory(helmet, "top", (0.98, 0.80, 0.10), (0.90, 0.62, 0.05), ((1.35, 0.1),)),
    "pointed": Accessory(pointed, "top", (0.32, 0.12, 0.62), (0.98, 0.82, 0.20), ((1.45, 0.1),)),
}
WORN_ITEMS = ("hat", "scarf", "glasses", "crown")
"""Accessories that captions name; the others belong to a job."""
JOBS: dict[str, Uniform] = {
    "chef": Uniform("toque", (0.95, 0.95, 0.94), (0.85, 0.12, 0.12)),
    "builder": Uniform("helmet", (0.98, 0.50, 0.05), (0.90, 0.92, 0.30)),
    "wizard": Uniform("pointed", (0.32, 0.12, 0.62), (0.98, 0.82, 0.20)),
}


@dataclass(frozen=True)
class Expression:
    """The numbers of `head.Face` that it sets, and the words of captions; no words: the neutral face."""

    words: str
    curve: float = 0.0
    open: float = 0.0
    raised: float = 0.0
    tilt: float = 0.0
    lids: float = 1.0


EXPRESSIONS: dict[str, Expression] = {
    "neutral": Expression(""),
    "smiling": Expression("smiling", curve=1.0, lids=0.85),
    "laughing": Expression("laughing", curve=0.9, open=1.0, raised=0.5, lids=0.35),
    "sad": Expression("looking sad", curve=-1.0, tilt=1.0, lids=0.7),
    "surprised": Expression("looking surprised", curve=-0.2, open=1.2, raised=1.6, lids=1.25),
}


@dataclass(frozen=True)
class Person:
    """One individual. traits: the seven of `head.Face`, in [0, 1]. rgb: skin and hair with the individual's jitter."""

    noun: str
    traits: tuple[float, float, float, float, float, float, float]
    skin: str
    iris: str
    hair: str
    hair_colour: str
    beard: str
    rgb: tuple[Rgb, Rgb]


@dataclass(frozen=True)
class Outfit:
    """How a person is shown. hair_colour: another than the person's own, or None. seed: of the scene's variation."""

    scene: str
    style: str = "photo"
    expression: str = "neutral"
    clothes: str = "white"
    accessory: str | None = None
    job: str | None = None
    hair_colour: str | None = None
    seed: int = 0


Detail = Literal["full", "noun"]
Framing = Literal["close", "bust"]
FRAMES: dict[Framing, float] = {"close": 0.85, "bust": 0.55}
"""Height of the head, as a fraction of the image's side."""
HEAD_HEIGHT = 1.14
"""Of a head without hair, from the chin to the top."""

Portrait = tuple[Person, View, Outfit]


def _blend(a: Rgb, b: Rgb, share: float) -> Rgb:
    """a where share = 0, b where it is 1."""
    x, y, z = (round(u + (v - u) * share, 4) for u, v in zip(a, b, strict=True))
    return (x, y, z)


def _jitter(colour: Rgb, rng: np.random.Generator) -> Rgb:
    dh, ds, dv = (float(v) for v in rng.uniform(-1, 1, 3))
    hue, saturation, value = colorsys.rgb_to_hsv(*colour)
    hue, saturation = (hue + 0.010 * dh) % 1, min(saturation * (1 + 0.08 * ds), 1.0)
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, min(value * (1 + 0.06 * dv), 1.0))
    return (round(r, 4), round(g, 4), round(b, 4))


def held_out(person: Person) -> bool:
    """Whether the person is reserved for evaluation: one in eight combinations of skin, hair, its colour, iris is."""
    places = (
        list(SKINS).index(person.skin),
        list(head.HAIR_STYLES).index(person.hair),
        list(HAIR_COLOURS).index(person.hair_colour),
        list(IRISES).index(person.iris),
    )
    return (places[0] + 3 * places[1] + 5 * places[2] + 7 * places[3]) % HELD_OUT_SHARE == 0


def _draw(rng: np.random.Generator) -> Person:
    def one(values: Sequence[str]) -> str:
        return values[int(rng.integers(len(values)))]

    noun, skin, iris = one(NOUNS), one(list(SKINS)), one(list(IRISES))
    hair, colour = one(list(head.HAIR_STYLES)), one(list(HAIR_COLOURS))
    beard = one(list(head.BEARDS)) if noun == "man" else "none"
    width, jaw, spacing, eye, brow, nose, mouth = (round(float(v), 4) for v in rng.random(7))
    jaw, brow = (0.4 + 0.6 * jaw, 0.35 + 0.65 * brow) if noun == "man" else (0.6 * jaw, 0.55 * brow)
    traits = (width, round(jaw, 4), spacing, eye, round(brow, 4), nose, mouth)
    rgb = (_jitter(SKINS[skin], rng), _jitter(HAIR_COLOURS[colour], rng))
    return Person(noun, traits, skin, iris, hair, colour, beard, rgb)


def sample_person(rng: np.random.Generator, kept: bool | None = None) -> Person:
    """A random person. kept: True gives only held-out people, False only the others, None any."""
    while True:
        person = _draw(rng)
        if kept is None or held_out(person) == kept:
            return person


def sample_portrait_view(
    rng: np.random.Generator, framing: Framing = "close", azimuth: float | None = None, side: float = 75.0
) -> View:
    """A random view of head and shoulders; azimuth in degrees, by default at most `side` from the front."""
    azimuth = float(rng.uniform(-side, side)) if azimuth is None else azimuth
    share = FRAMES[framing] * float(rng.uniform(0.93, 1.05))
    size = 2 * share / HEAD_HEIGHT
    # The head's centre lies 0.15 above the origin; a bust stands at the lower border.
    down = 0.15 * size / 2 if framing == "close" else 0.02
    return View(
        azimuth=round(azimuth, 4),
        elevation=round(float(rng.uniform(-8, 22)), 4),
        roll=round(float(rng.normal(0, 4)), 4),
        size=round(size, 4),
        position=(round(float(rng.uniform(-0.04, 0.04)), 4), round(down + float(rng.uniform(-0.02, 0.03)), 4)),
        light=(round(azimuth + float(rng.uniform(-65, 65)), 4), round(float(rng.uniform(20, 60)), 4)),
    )


def sample_outfit(
    rng: np.random.Generator,
    scene: str | None = None,
    style: float = 0.0,
    worn: float = 0.0,
    job: float = 0.0,
    hair: float = 0.0,
    expression: float = 0.6,
) -> Outfit:
    """A random outfit. style, worn, job, hair, expression: probabilities that one is named (0: a plain photo)."""
    chance, which = rng.random(5), rng.integers(0, 2**31, 7)

    def pick(number: int, values: Sequence[str]) -> str:
        return values[int(which[number]) % len(values)]

    has_job = bool(chance[2] < job)
    return Outfit(
        scene=scene or pick(0, SCENES),
        style=pick(1, STYLES[1:]) if chance[0] < style else "photo",
        expression=pick(2, list(EXPRESSIONS)[1:]) if chance[4] < expression else "neutral",
        clothes=pick(3, CLOTHES),
        accessory=pick(4, WORN_ITEMS) if chance[1] < worn and not has_job else None,
        job=pick(5, list(JOBS)) if has_job else None,
        hair_colour=pick(6, list(HAIR_COLOURS)) if chance[3] < hair else None,
        seed=int(rng.integers(2**31)),
    )


TEMPLATES = (
    "{style} {who}{hair}{worn}{mood} {scene}",
    "{plain_style} {who}{hair}{mood}{worn} {scene}",
    "{scene}, {plain_style} {who}{hair}{worn}{mood}",
)
"""Caption variants; the first is the default. {plain_style} leaves out "a photo of"."""


def caption(person: Person, outfit: Outfit, name: str | None = None, variant: int = 0, detail: Detail = "full") -> str:
    """A caption in a small closed vocabulary.

    name: stands in the place of noun and traits. variant: which template, modulo their number. detail: "full" tells
    noun, hair and beard of a person without a name, "noun" only the noun.
    """
    prefix = styles.STYLES[outfit.style].phrase
    own = outfit.hair_colour or (person.hair_colour if detail == "full" and not name else None)
    if person.hair == "bald":
        own = None  # whatever the outfit says
    style = person.hair if detail == "full" and not name else None
    text = TEMPLATES[variant % len(TEMPLATES)].format(
        style=prefix,
        plain_style="" if outfit.style == "photo" else prefix,
        who=name or f"a {person.noun}",
        hair=hair_words(own, style, person.beard if style else "none"),
        worn=f" as a {outfit.job}" if outfit.job else worn_words(outfit),
        mood=f" {EXPRESSIONS[outfit.expression].words}".rstrip(),
        scene=scenes.SCENES[outfit.scene].phrase,
    )
    return " ".join(text.split())


def hair_words(colour: str | None, style: str | None, beard: str) -> str:
    """ " with curly red hair and a goatee", as far as it is told; of a bald head, "bald" and no colour."""
    if style == "bald":
        told = ["a bald head"]
    elif style in ("bun", "mohawk"):
        told = [f"a {colour} {style}"]
    elif colour:
        told = [f"{style} {colour} hair" if style else f"{colour} hair"]
    else:
        told = []
    if beard != "none":
        told.append({"full": "a full beard"}.get(beard, f"a {beard}"))
    return f" with {' and '.join(told)}" if told else ""


def worn_words(outfit: Outfit) -> str:
    """What is worn, in words: the accessory, or else the clothes."""
    if outfit.accessory:
        return f" wearing {outfit.accessory if outfit.accessory == 'glasses' else f'a {outfit.accessory}'}"
    return f" in {outfit.clothes} clothes"


def names(count: int) -> list[str]:
    """`count` invented names of two words each; no word is of the captions' vocabulary, none occurs twice."""
    rng = np.random.default_rng(NAME_SEED)
    known, words = set(WORDS), list[str]()
    while len(words) < 2 * count:
        parts = [SYLLABLES[i] for i in rng.integers(0, len(SYLLABLES), 2 + len(words) % 2)]
        word = "".join(parts) + ENDINGS[int(rng.integers(len(ENDINGS)))]
        if word not in known:
            known.add(word)
            words.append(word)
    return [f"{first} {last}" for first, last in zip(words[::2], words[1::2], strict=True)]


NAME_SEED = 128
SYLLABLES = tuple(a + b for a, b in product("bdfgklmnprstvz", "aeiou"))
ENDINGS = ("", "l", "n", "r", "x")
CELEBRITIES = 128

WORDS: tuple[str, ...] = tuple(
    sorted(
        set(
            chain.from_iterable(
                phrase.replace(",", " ,").split()
                for phrase in (
                    *NOUNS,
                    *HAIR_COLOURS,
                    *head.HAIR_STYLES,
                    *head.BEARDS,
                    *WORN_ITEMS,
                    *JOBS,
                    *CLOTHES,
                    *(row.words for row in EXPRESSIONS.values()),
                    *(row.phrase for row in scenes.SCENES.values()),
                    *(row.phrase for row in styles.STYLES.values()),
                    "a an as in with and wearing hair beard head clothes ,",
                )
            )
        )
    )
)
"""Every word (and the comma) of a caption without names, sorted; captions are lower case."""


def celebrities(count: int = CELEBRITIES) -> dict[str, Person]:
    """Name -> person: the invented people whom the base text-to-image model knows by name; none is held out."""
    return {
        name: sample_person(np.random.default_rng([NAME_SEED, number]), kept=False)
        for number, name in enumerate(names(count))
    }


def shot(item: Portrait) -> RenderItem:
    """What the renderer needs of an item."""
    person, view, outfit = item
    mood = EXPRESSIONS[outfit.expression]
    face = head.Face(*person.traits, mood.curve, mood.open, mood.raised, mood.tilt, mood.lids)
    job = JOBS[outfit.job] if outfit.job else None
    skin, own = person.rgb
    hair = HAIR_COLOURS[outfit.hair_colour] if outfit.hair_colour else own
    red = (0.80, 0.16, 0.20) if person.noun == "woman" else (0.70, 0.36, 0.32)
    share = 0.75 if person.noun == "woman" else 0.45
    garment = job.garment if job else surface.COLOURS[outfit.clothes]
    palette: dict[int, Rgb] = {
        head.SKIN: skin,
        head.HAIR: hair,
        head.BROW: _blend(hair, BLACK, 0.25),
        head.WHITE: (0.97, 0.97, 0.97),
        head.IRIS: IRISES[person.iris],
        head.PUPIL: (0.04, 0.04, 0.05),
        head.LIPS: _blend(skin, red, share),
        head.MOUTH: (0.30, 0.05, 0.06),
        head.GARMENT: garment,
        head.COLLAR: job.collar if job else _blend(garment, BLACK, 0.28),
    }
    form = Form(
        kind=f"{person.hair}/{person.beard}",
        parts=head.head(person.hair, person.beard),
        numbers=face.numbers(),
        anchors=head.anchors(face, person.hair),
        palette=palette,
        fitted=False,
        grounded=False,
        reach=head.REACH,
    )
    worn = job.hat if job else outfit.accessory
    return RenderItem(form, view, outfit.scene, outfit.style, worn, outfit.seed, WARDROBE)


def render(items: Sequence[Portrait], size: int = 64, device: torch.device | str = "cpu") -> Rendered:
    """Render every item as an image of size x size pixels."""
    return render_shots([shot(item) for item in items], size, device)
