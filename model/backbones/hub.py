"""Resolving a spec to local files, and the error messages if that fails."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from model.backbones.variant import Spec
from runtime.errors import ModelError
from runtime.files import refuse_pointers


def resolve(spec: Spec, patterns: Sequence[str], hint: str = "") -> Path:
    """The local file or folder of `spec`, fetched from the hub at the pinned revision if `path` is not local.

    Only files matching a glob of `patterns` are fetched. `hint` says where to get missing local files. Raises
    ModelError naming the path, also for a git-lfs pointer in place of a file.
    """
    if spec.local.exists():
        inside = (file for pattern in patterns for file in spec.local.glob(pattern))
        refuse_pointers([spec.local] if spec.local.is_file() else inside)
        return spec.local
    if spec.revision is None or not spec.is_hub_id:
        advice = hint or "put the weights there, or choose another variant or path"
        raise ModelError(f"{spec.path}: no such file or folder; {advice}")
    try:
        folder = huggingface_hub.snapshot_download(spec.path, revision=spec.revision, allow_patterns=list(patterns))
    except Exception as error:  # from the hub client or its HTTP library
        raise ModelError(
            f"{spec.path}: revision {spec.revision} could not be fetched from the hub ({brief(error)}); go online once,"
            " or download it elsewhere and set `path` to its folder"
        ) from error
    return Path(folder)


def identify(spec: Spec, files: Iterable[Path]) -> tuple[str, str]:
    """(name, revision) of loaded weights, the same on every machine.

    From the hub: the hub id and the commit. Local: the path as written (its last part if absolute) and the SHA-256
    over the weight files.
    """
    if not spec.local.exists() and spec.revision is not None:
        return spec.path, spec.revision
    files = list(files)
    refuse_pointers(files)
    name = Path(spec.path).name if Path(spec.path).expanduser().is_absolute() else spec.path
    return name, sha256(files)


def sha256(files: Iterable[Path]) -> str:
    """Hex digest over the bytes of `files`, sorted by name."""
    digest = hashlib.sha256()
    for file in sorted(files):
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def reading(path: str, what: str) -> Iterator[None]:
    """Turn any error a library raises while reading `path` as `what` into one sentence."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # for bad files the libraries raise anything, tokenizers a plain Exception
        raise ModelError(
            f"{path}: cannot be read as {what} ({brief(error)}); replace it, or correct the variant's JSON"
        ) from error


def from_pretrained(
    kind: Any, folder: Path, path: str, what: str, types: Sequence[str] = (), unread: Sequence[str] = (), **options: Any
) -> Any:
    """A diffusers or transformers model of class `kind` with all weights of the files in `folder` and no others.

    Args:
        types: model types of config.json that `kind` can read; empty: its own.
        unread: patterns of weights in the file that a published checkpoint has beyond `kind`, and no result depends on.
        options: passed to the library; its file must be safetensors unless `use_safetensors` allows others.

    Raises:
        ModelError: names `path`; also for a folder of another model type and for missing, unexpected or misshapen
            weights, which both libraries only log.
    """
    with reading(path, what), no_progress_bar():
        types = types or (own_type(kind),)
        if (found := model_type(folder)) not in types:
            raise ValueError(f"config.json is of a {found}, expected {' or '.join(types)}")
        settings = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True} | options
        model, info = kind.from_pretrained(folder, **settings)
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key[0] if isinstance(key, tuple) else key) for key in info.get(fault, ()))
        if fault == "unexpected_keys":
            keys = [key for key in keys if not any(re.match(pattern, key) for pattern in unread)]
        if keys:
            word = fault.partition("_")[0]
            raise ModelError(f"{path}: {len(keys)} {word} weights for {what}, first '{keys[0]}'; replace the file")
    return model


def own_type(kind: Any) -> str:
    """The type that `kind` writes to config.json."""
    return str(kind.config_class.model_type if issubclass(kind, PreTrainedModel) else kind.__name__)


def model_type(folder: Path) -> str:
    """The type in the config.json of `folder`: transformers' `model_type` or diffusers' `_class_name`.

    Raises OSError or ValueError if there is none.
    """
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = tree.get("model_type", tree.get("_class_name")) if isinstance(tree, dict) else None
    if not isinstance(found, str):
        raise ValueError("config.json has neither model_type nor _class_name")
    return found


def require_weights(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raise ValueError naming the first weight of `state` that is missing, unexpected or misshapen for `wanted`."""
    for fault, keys in (("missing", wanted.keys() - state.keys()), ("unexpected", state.keys() - wanted.keys())):
        if keys:
            raise ValueError(f"{len(keys)} {fault} weights, first '{min(keys)}'")
    for key, value in wanted.items():
        if value.shape != state[key].shape:
            raise ValueError(f"'{key}' is {list(state[key].shape)}, expected {list(value.shape)}")


def require_vocabulary(folder: Path) -> None:
    """Raise FileNotFoundError if a tokenizer folder has no vocabulary: transformers would make an empty tokenizer."""
    choices = (("tokenizer.json",), ("vocab.txt",), ("vocab.json", "merges.txt"))
    if not any(all((folder / name).is_file() for name in names) for names in choices):
        raise FileNotFoundError("it has neither tokenizer.json, vocab.txt nor vocab.json with merges.txt")


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """Keep transformers from showing a progress bar for every model it loads."""
    shown = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            enable_progress_bar()


def brief(error: BaseException) -> str:
    """The first line of an error, at most 160 characters, without final punctuation."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[0].split()) if lines else type(error).__name__
    return text[:160].rstrip(". :")
