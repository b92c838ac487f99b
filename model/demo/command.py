"""Open a page in the browser that generates images of a subject from its photos; it is served on this machine only.

Without options it offers the toybox's ready adapters; `--adapter FOLDER --params configs/sd15.yaml` another one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from model.adapter import Adapter
from model.demo.studio import Studio
from model.methods.registry import method_of
from model.sampler import ADAPTERS, is_ready
from runtime.cli import read_params, shared_options
from runtime.errors import UserError

HOST, PORT = "127.0.0.1", 7860
"""Only this machine can open the page."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.add_argument(
        "--adapter",
        help="folder of an adapter, or its repository, owner/name@revision (default: the toybox's, one per method)",
    )
    parser.add_argument("--port", type=int, default=PORT, help="0 takes any free one (default: %(default)s)")
    parser.add_argument("--device", help="cpu or cuda (default: cuda if available, or run.device with --params)")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    shared_options(parser)


def main(options: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C.

    The backbones are those the adapter was trained on, or with --params or --set those of `backbones.variant`.
    Raises UserError if gradio is not installed or the port is taken, ModelError for an adapter that cannot be used.
    """
    if find_spec("gradio") is None:
        raise UserError(
            "the page needs the package gradio, which is not installed; install the extra demo with"
            " .venv/bin/uv pip install -r pyproject.toml --extra demo"
        )
    variant, device = None, "cuda" if torch.cuda.is_available() else "cpu"
    if options.params or options.set:
        params = read_params(options)
        variant, device = params.variant, params.run.torch_device()
    studio = Studio(offered(options.adapter), variant, options.device or device, options.dtype)
    with listening(options.port) as door, tempfile.TemporaryDirectory(prefix="customcontrast-demo-") as folder:
        server = page_server(studio, Path(folder))
        print(f"http://{HOST}:{door.getsockname()[1]} (open it in a browser; Ctrl-C stops it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[door])


def offered(adapter: str | None) -> Mapping[str, str | Path]:
    """The adapters of the page by method: the given one, else those of the toybox that are there."""
    if adapter is not None:
        return {method_of(Adapter.from_pretrained(adapter).config).name: adapter}
    found: dict[str, str | Path] = {name: folder for name, folder in ADAPTERS.items() if is_ready(name)}
    if not found:
        raise UserError(f"there is no adapter in {', '.join(map(str, ADAPTERS.values()))}; pass one with --adapter")
    return found


def listening(port: int) -> socket.socket:
    """A socket on this machine's loopback address; UserError if the port cannot be had."""
    door = socket.socket()
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((HOST, port))
        door.listen()
    except (OSError, OverflowError) as error:
        door.close()
        reason = getattr(error, "strerror", None) or "it is none of 0 to 65535"
        raise UserError(f"port {port} of {HOST} cannot be used ({reason.lower()}); pass another with --port") from None
    return door


def page_server(studio: Studio, folder: Path) -> Any:
    """The uvicorn server of the page; what it stores is in `folder`."""
    # Read when gradio is imported: no usage statistics, no check for a newer version, uploads in the folder.
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder)}
    import uvicorn

    from model.demo.page import application

    return uvicorn.Server(uvicorn.Config(application(studio, folder), log_level="warning"))
