"""What a generated image says of itself: text chunks of its PNG, with IPTC's word for what a trained model made."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SETTINGS = "customcontrast"
"""Text chunk with all that the image was made by, as JSON."""
NAMED = {"model": "base_model", "adapter": "adapter"}
"""Text chunks of their own: the key of the settings that each repeats, where they have it."""
XMP = "XML:com.adobe.xmp"
PACKET = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""'
    ' xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"'
    ' Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    '</rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
"""XMP with IPTC's DigitalSourceType, which image hosts and search engines read."""


def marks(settings: Mapping[str, Any]) -> PngInfo:
    """The text chunks of a generated image: `generated`, `model`, `adapter`, its settings as JSON, and XMP.

    settings: JSON-like; without `base_model` the image is a rendering, which no trained model made.
    """
    chunks = PngInfo()
    chunks.add_itxt("generated", "yes")
    for chunk, key in NAMED.items():
        if settings.get(key):
            chunks.add_itxt(chunk, str(settings[key]))
    chunks.add_itxt(SETTINGS, json.dumps(settings, ensure_ascii=False))
    if settings.get("base_model"):
        chunks.add_itxt(XMP, PACKET)
    return chunks


def marked_png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """A generated image as a PNG with its `marks`."""
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "PNG", pnginfo=marks(settings))
    return stream.getvalue()
