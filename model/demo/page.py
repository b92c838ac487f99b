"""The page of `customcontrast demo`, in gradio: fields, what happens when they are used, and the server's answers."""

from __future__ import annotations

import base64
import html
import io
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from PIL import Image

from model.demo.photos import Click, DemoPhoto, open_photos
from model.demo.studio import IMAGES, DrawingSettings, DrawnImage, Report, Studio, archive
from model.sampler import READY
from runtime.closure import ROOT
from runtime.errors import ModelError, UserError

STYLE = Path(__file__).with_name("page.css")
TITLES = {
    "customcontrast": "CustomContrast",
    "mfi": "CustomContrast",
    "realcustom": "RealCustom",
    "realcustom_pp": "RealCustom++",
    "dreamidentity": "DreamIdentity",
    "ip_adapter_plus": "IP-Adapter-plus",
}
"""Names of the methods on the page."""
ADD, REMOVE = "add to the subject", "remove from it"
PIXELATED = 128
"""Images up to this side, in pixels, are enlarged without smoothing."""
START = "Take an example, or add photos and say what they show."
POLICY = b"default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
"""The browser fetches nothing from elsewhere, whatever a page asks for."""


@dataclass(frozen=True)
class Example:
    """Photos of the toybox with a prompt."""

    title: str
    class_noun: str
    prompt: str
    files: tuple[str, ...]

    def photos(self) -> list[DemoPhoto]:
        """The photos, freshly opened."""
        return open_photos([ROOT / "docs" / file for file in self.files])


EXAMPLES = (
    Example("Example: mug", "mug", "a photo of a mug on the beach", ("toybox_reference.png",)),
    Example(
        "Example: mushroom, 3 photos",
        "mushroom",
        "a photo of a mushroom in the forest",
        tuple(f"toybox_photos/mushroom_{number}.jpg" for number in (1, 2, 3)),
    ),
)


def application(studio: Studio, folder: Path) -> Any:
    """The page as an ASGI application, which lets the browser fetch from itself only; `folder`: for its files."""
    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        DemoPage(studio, folder).blocks,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        allowed_paths=[str(folder)],
        theme=gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font="sans-serif", font_mono="monospace"),
        css_paths=STYLE,
    )

    async def guarded(scope: Any, receive: Any, send: Callable[[Any], Awaitable[None]]) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (b"content-security-policy", POLICY)]
            await send(message)

        await app(scope, receive, with_policy if scope["type"] == "http" else send)

    return guarded


BAR = gr.Progress()
"""Default of a handler's progress bar; gradio passes that of the event in its place."""
Answer = dict[Any, Any]
"""New values, or changes, of some of the page's fields."""


def told(work: Callable[..., Answer]) -> Callable[..., Answer]:
    """A handler of the page whose faults that the user can correct are one sentence in the status line."""

    @wraps(work)
    def handler(page: DemoPage, *values: Any) -> Answer:
        try:
            return work(page, *values)
        except (ModelError, UserError) as error:
            return {page.status: said(str(error), "error")}

    return handler


class DemoPage:
    """The page's fields and what happens when they are used."""

    def __init__(self, studio: Studio, folder: Path) -> None:
        """folder: of the images that are sampled."""
        self.studio, self.folder = studio, folder
        self.side = studio.variant.resolution
        self.classes = ["pixelated"] if self.side <= PIXELATED else []
        # Other backbones know nothing of these toys.
        self.examples = EXAMPLES if Path(studio.variant.diffusion.path).parent == READY.parent else ()
        with gr.Blocks(title="CustomContrast", analytics_enabled=False) as self.blocks:
            self.photos, self.chosen = gr.State([]), gr.State(0)
            gr.HTML(
                "<h1>CustomContrast</h1><p>New images of a subject from your photos of it. Everything runs on this"
                f" machine ({html.escape(studio.device)}); the models are the variant"
                f" <b>{html.escape(studio.variant.name)}</b>, {self.side} × {self.side} pixels.</p>",
                elem_id="title",
            )
            with gr.Row():
                with gr.Column(min_width=320):
                    self.subject_fields()
                with gr.Column(min_width=320):
                    self.image_fields()
                    self.status = gr.HTML(said(START), elem_id="status")
                    self.result_fields()
            self.connect()

    def subject_fields(self) -> None:
        """Photos, their class noun, and the masks."""
        gr.HTML("<h2>1. The subject</h2>")
        with gr.Row(elem_classes="buttons"):
            self.takes = [gr.Button(example.title, size="sm", min_width=140) for example in self.examples]
        self.noun = gr.Textbox(
            "", label="Class noun: what the subject is", placeholder="mug", max_lines=1, elem_id="noun"
        )
        with gr.Row(elem_classes="buttons"):
            self.upload = gr.UploadButton("Add photos", file_count="multiple", size="md", min_width=100)
            self.find = gr.Button("Find it", size="md", min_width=100)
            self.clear = gr.Button("Remove all", size="md", min_width=100)
        with gr.Column(visible=False) as self.correction:
            gr.HTML("<p>What the method sees of each photo. Choose one to correct it.</p>")
            self.strip = gr.Gallery(
                show_label=False, columns=4, fit_columns=False, height="auto", object_fit="contain",
                allow_preview=False, buttons=[], format="png", elem_id="strip", elem_classes=self.classes,
            )  # fmt: skip
            with gr.Group():
                self.editor = gr.Image(
                    interactive=False, type="pil", format="png", buttons=[], elem_id="editor",
                    elem_classes=self.classes,
                )  # fmt: skip
                self.mode = gr.Radio([ADD, REMOVE], value=ADD, label="A click on the photo will")
                self.spot = gr.Slider(1, 30, value=4, step=1, label="Spot, % of the photo (where SAM does not follow)")
                self.undo = gr.Button("Undo the last click", size="sm")

    def image_fields(self) -> None:
        """What is asked for: the fields of `DrawingSettings`."""
        names = list(self.studio.sources)
        gr.HTML("<h2>2. The image</h2>")
        self.prompt = gr.Textbox(
            "", label="Prompt, with the class noun", lines=2, placeholder="a photo of a mug on the beach"
        )
        self.method = gr.Radio(
            [(TITLES.get(name, name), name) for name in names], value=names[0], label="Method", visible=len(names) > 1
        )
        with gr.Row():
            images = gr.Slider(1, IMAGES, value=2, step=1, label="Images", min_width=140)
            seed = gr.Number(value=0, precision=0, label="Seed of the first", min_width=140)
        strength = gr.Slider(0, 2, value=1, step=0.05, label="Strength of the subject (λ; 0: none)")
        self.masks = gr.Checkbox(
            value=self.studio.configs[names[0]].location_masks,
            label="Location masks",
            info="Confine the subject to where attention sees it, and show where that is.",
        )
        with gr.Accordion("More", open=False):
            steps = gr.Slider(2, 100, value=50, step=1, label="Steps")
            guidance = gr.Slider(1, 20, value=7.5, step=0.5, label="Guidance scale")
            negative = gr.Textbox("", label="Negative prompt", max_lines=2)
        self.draw = gr.Button("Generate", variant="primary", size="lg", elem_id="draw")
        self.fields = {
            "method": self.method,
            "class_noun": self.noun,
            "prompt": self.prompt,
            "negative_prompt": negative,
            "strength": strength,
            "seed": seed,
            "images": images,
            "steps": steps,
            "guidance_scale": guidance,
            "location_masks": self.masks,
        }

    def result_fields(self) -> None:
        """Images, maps, and the archive."""
        with gr.Column(visible=False) as self.results:
            gr.HTML("<h2>3. The result</h2>")
            self.gallery = gr.Gallery(
                show_label=False, columns=2, fit_columns=False, object_fit="contain", height="auto",
                buttons=["download", "fullscreen"], elem_id="gallery", elem_classes=self.classes,
            )  # fmt: skip
            self.maps = gr.HTML(elem_id="maps", elem_classes=self.classes)
            self.download = gr.DownloadButton("Download images and settings (zip)", size="md", elem_id="download")

    def connect(self) -> None:
        """Give each button its handler; those that run models wait for each other."""
        models: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
        busy = models | {"show_progress_on": self.status}
        quiet = models | {"show_progress": "hidden"}
        subject = [self.photos, self.chosen, self.correction, self.strip, self.editor, self.status]
        for button, example in zip(self.takes, self.examples, strict=True):
            button.click(partial(self.take, example), None, [*subject, self.noun, self.prompt], **busy)
        self.upload.upload(self.add, [self.photos, self.upload, self.noun], subject, **busy)
        for search in (self.find.click, self.noun.submit):
            search(self.search, [self.photos, self.chosen, self.noun], subject, **busy)
        self.clear.click(self.remove, None, subject, **quiet)
        self.strip.select(self.choose, self.photos, subject, **quiet)
        self.editor.select(self.click, [self.photos, self.chosen, self.mode, self.spot], subject, **quiet)
        self.undo.click(self.take_back, [self.photos, self.chosen], subject, **quiet)
        configs = self.studio.configs
        self.method.change(lambda name: configs[name].location_masks, self.method, self.masks, show_progress="hidden")
        self.draw.click(
            self.generate,
            {self.photos, self.chosen, *self.fields.values()},
            [*subject, self.results, self.gallery, self.maps, self.download],
            **busy,
        )

    def shown(self, own: list[DemoPhoto], index: int) -> Answer:
        """The photos, one of which is open for correction."""
        index = min(index, max(len(own) - 1, 0))
        editor = gr.Image(own[index].overview(), label=f"Click to correct: {own[index].name}") if own else None
        return {
            self.photos: own,
            self.chosen: index,
            self.correction: gr.Column(visible=bool(own)),
            self.strip: [thumbnail(photo) for photo in own],
            self.editor: editor,
        }

    def searched(self, own: list[DemoPhoto], index: int, noun: str, report: Report) -> Answer:
        """The photos after a search for the noun, and what it found or why it failed."""
        try:
            self.studio.find(own, noun, report)
        except (ModelError, UserError) as error:
            return self.shown(own, index) | {self.status: said(str(error), "error")}
        lost = [place for place, photo in enumerate(own) if photo.mask is None or not photo.mask.any()]
        if lost:
            names = ", ".join(own[place].name for place in lost)
            text = f"no {noun.strip()} was found in {names}; click on it in the photo, or correct the class noun"
            return self.shown(own, lost[0]) | {self.status: said(text, "error")}
        return self.shown(own, index) | {self.status: said("Check the outline, then generate.")}

    @told
    def add(self, own: list[DemoPhoto], files: list[str] | None, noun: str, progress: gr.Progress = BAR) -> Answer:
        """Add uploaded files, and look for the subject in them if its noun is known."""
        own = [*own, *open_photos([Path(file) for file in files or []])]
        if not noun.strip():
            return self.shown(own, len(own) - 1) | {self.status: said("Write what the subject is, then find it.")}
        return self.searched(own, len(own) - 1, noun, reporter(progress))

    @told
    def search(self, own: list[DemoPhoto], index: int, noun: str, progress: gr.Progress = BAR) -> Answer:
        """Look for the subject."""
        if not own:
            raise ModelError("there is no photo of the subject; add one, or take an example")
        return self.searched(own, index, noun, reporter(progress))

    def take(self, example: Example, progress: gr.Progress = BAR) -> Answer:
        """Show an example in place of the photos."""
        found = self.searched(example.photos(), 0, example.class_noun, reporter(progress))
        return found | {self.noun: example.class_noun, self.prompt: example.prompt}

    def remove(self) -> Answer:
        """Remove all photos."""
        return self.shown([], 0) | {self.status: said(START)}

    def choose(self, own: list[DemoPhoto], event: gr.SelectData) -> Answer:
        """Open another photo for correction."""
        return self.shown(own, int(event.index))

    @told
    def click(self, own: list[DemoPhoto], index: int, mode: str, percent: float, event: gr.SelectData) -> Answer:
        """Correct a mask at the place of a click."""
        photo = own[index]
        x, y = photo.place(*event.index)
        photo.click(Click(x, y, mode == ADD, percent / 100 * max(photo.image.size)), self.studio.finder)
        return self.shown(own, index)

    @told
    def take_back(self, own: list[DemoPhoto], index: int) -> Answer:
        """Take the last click back."""
        if own:
            own[index].undo(self.studio.finder)
        return self.shown(own, index)

    def generate(self, given: Answer, progress: gr.Progress = BAR) -> Iterator[Answer]:
        """Sample the images, each shown as soon as it is done."""
        own, index, started = given[self.photos], given[self.chosen], time.monotonic()
        wanted = DrawingSettings(**{name: given[field] for name, field in self.fields.items()})
        drawn: list[DrawnImage] = []
        try:
            for item in self.studio.draw(own, wanted, self.folder, reporter(progress)):
                drawn.append(item)
                yield {
                    self.results: gr.Column(visible=True),
                    self.gallery: [(str(item.file), f"seed {item.settings['seed']}") for item in drawn],
                    self.maps: map_strips(drawn),
                    self.download: gr.DownloadButton(interactive=False),
                    self.status: said(f"{len(drawn)} of {counted(wanted.images, 'image')}."),
                }
            text = f"{counted(len(drawn), 'image')} in {time.monotonic() - started:.0f} s."
            packed = gr.DownloadButton(value=str(archive(drawn, own)), interactive=True)
            yield self.shown(own, index) | {self.status: said(text), self.download: packed}
        except (ModelError, UserError) as error:
            yield self.shown(own, index) | {self.status: said(str(error), "error")}


def reporter(progress: gr.Progress) -> Callable[[float, str], None]:
    """What is being done, as gradio's progress bar."""
    return lambda done, text: progress(done, desc=text)


def said(text: str, kind: str = "note") -> str:
    """A sentence in the status line; `kind`: note or error."""
    role, text = ("alert", f"Error: {text}") if kind == "error" else ("status", text)
    return f'<p class="{kind}" role="{role}">{html.escape(text)}</p>'


def counted(count: int, what: str) -> str:
    """A number of things."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def thumbnail(photo: DemoPhoto) -> Image.Image:
    """The segment, or the photo while there is none, at most 256 pixels."""
    image = photo.cut_out() if photo.mask is not None and photo.mask.any() else photo.image.copy()
    image.thumbnail((256, 256))
    return image


def map_strips(drawn: list[DrawnImage]) -> str:
    """A row of overlays for each image, or a sentence if there are none."""
    if not any(item.maps for item in drawn):
        return "<p>Location maps are recorded where location masks are on.</p>"
    rows = ["<h3>Where attention saw the subject, over the steps (violet: nowhere, yellow: here)</h3>"]
    for item in drawn:
        seed = item.settings["seed"]
        figures = "".join(
            f'<figure><img src="{data_uri(image)}" alt="Location map of seed {seed}, {name}">'
            f"<figcaption>{name}</figcaption></figure>"
            for name, image in item.overlays()
        )
        rows.append(f'<div class="maps" tabindex="0" role="group" aria-label="Seed {seed}">{figures}</div>')
    return "".join(rows)


def data_uri(image: Image.Image) -> str:
    """An image in the page itself."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
