"""Adapters on the hub: pushed, fetched, refused, against a local server that answers as the hub does."""

from __future__ import annotations

import errno
import json
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml

from model.adapter import CARD, DESCRIPTION, README, WEIGHTS, Adapter
from model.card import About, Scores
from model.pipeline import CustomContrastPipeline, CustomContrastXLPipeline, build_pipeline
from runtime.errors import ModelError
from tests.world.hub import Hub, serving
from tests.world.models import TinyDiffusion, make_adapter
from tests.world.pipelines import stock

NAME = "ann/mugs"
ABOUT = About(
    license="apache-2.0",
    data="Photos of mugs.",
    intended_use="Mugs, not cups.",
    scores=Scores(protocol="0123456789abcdef", data="Mugs of the house", values={"CT": 0.3, "E-DI": 0.5}),
)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with serving(monkeypatch, str(tmp_path / "cache")) as found:
        yield found


@pytest.fixture
def adapter(tiny_sd: TinyDiffusion) -> Adapter:
    made = make_adapter(tiny_sd)
    made.data_hash = "d1"
    made.card = {"steps": 7, "triplets": 40, "recipe": {"data": "d1", "train": {"batch": 4}, "ranks": [2, "cpu"]}}
    return made


def files_of(adapter: Adapter, folder: Path) -> dict[str, bytes]:
    adapter.save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def shared(hub: Hub, adapter: Adapter, tmp_path: Path) -> str:
    """A public repository with the adapter and files that nobody asked for; its commit."""
    files = files_of(adapter, tmp_path / "files") | {"training.pt": b"pickle", "raw/adapter.safetensors": b"x"}
    return hub.repository(NAME).commit("main", files)


def same(one: Adapter, other: Adapter) -> bool:
    state = other.state_dict()
    return one.config == other.config and all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def test_pushed_adapter_is_what_the_server_received_and_loads_again(hub: Hub, adapter: Adapter, tmp_path: Path):
    with torch.no_grad():
        next(adapter.parameters()).mul_(1.5)
    where = adapter.push_to_hub(NAME, about=ABOUT, token=hub.owner, message="Mugs")
    repository = hub.repositories[NAME]
    assert where == f"{NAME}@{repository.refs['main']}" and repository.messages == ["Mugs"]
    received = repository.commits[repository.refs["main"]]
    adapter.save_pretrained(tmp_path / "mugs", ABOUT, NAME)
    assert received == {file.name: file.read_bytes() for file in (tmp_path / "mugs").iterdir()}
    assert set(received) == {WEIGHTS, DESCRIPTION, CARD, README}
    assert set(hub.objects.values()) == {received[WEIGHTS]}  # the large file alone went by git-lfs
    again = Adapter.from_pretrained(where)
    assert same(again, adapter) and again.source == where and again.data_hash == "d1"
    assert again.card == adapter.card and again.card["about"]["scores"]["protocol"] == "0123456789abcdef"


def test_fetched_files_are_the_repository_s_byte_for_byte_and_no_others(hub: Hub, shared: str, adapter: Adapter):
    found = Adapter.from_pretrained(NAME, revision=shared)
    assert same(found, adapter)
    snapshot = Path(huggingface_hub.constants.HF_HUB_CACHE) / "models--ann--mugs" / "snapshots" / shared
    stored = hub.repositories[NAME].commits[shared]
    assert {file.name: file.read_bytes() for file in snapshot.rglob("*") if file.is_file()} == {
        name: stored[name] for name in (WEIGHTS, DESCRIPTION, CARD)
    }


def test_moving_revision_is_logged_with_its_commit_and_a_pinned_one_is_not(
    hub: Hub, shared: str, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.WARNING, "model.repository")
    pin = f"pin it with '{NAME}@{shared}'"
    assert Adapter.from_pretrained(NAME).source == f"{NAME}@{shared}"
    assert [line.getMessage() for line in caplog.records] == [
        f"{NAME}: its default branch is commit {shared} at present; {pin}"
    ]
    hub.repositories[NAME].refs["v1"] = shared
    assert Adapter.from_pretrained(f"{NAME}@v1").source == f"{NAME}@{shared}"
    assert caplog.records[1].getMessage() == f"{NAME}: revision v1 is commit {shared} at present; {pin}"
    Adapter.from_pretrained(f"{NAME}@{shared}")
    assert len(caplog.records) == 2


def test_pinned_commit_stays_when_the_branch_moves_on(hub: Hub, shared: str, adapter: Adapter, tmp_path: Path):
    with torch.no_grad():
        next(adapter.parameters()).add_(1)
    later = adapter.push_to_hub(NAME, token=hub.owner)
    assert later != f"{NAME}@{shared}"
    assert not same(Adapter.from_pretrained(NAME, revision=shared), adapter)
    assert same(Adapter.from_pretrained(NAME), adapter)


def test_branch_is_created_and_the_default_one_stays(hub: Hub, shared: str, adapter: Adapter):
    for _ in range(2):  # also onto a branch that is there
        where = adapter.push_to_hub(NAME, branch="trial", token=hub.owner)
    assert hub.repositories[NAME].refs["main"] == shared
    assert Adapter.from_pretrained(NAME, revision="trial").source == where


def test_private_repository_needs_a_token_that_goes_to_the_hub_alone(hub: Hub, adapter: Adapter):
    where = adapter.push_to_hub(NAME, private=True, token=hub.owner)
    assert hub.repositories[NAME].private
    with pytest.raises(ModelError, match="a private one that you may not read; correct the name, or log in"):
        Adapter.from_pretrained(where)
    assert same(Adapter.from_pretrained(where, token=hub.member), adapter)
    fetched = [header for method, path, header in hub.requests if method == "GET" and path.startswith("/objects/")]
    assert fetched == [None]


def test_public_repository_is_not_taken_for_a_private_one(hub: Hub, shared: str, adapter: Adapter):
    with pytest.raises(ModelError, match=f"^{NAME}: is a public repository, and private=True was asked for"):
        adapter.push_to_hub(NAME, private=True, token=hub.owner)
    assert hub.repositories[NAME].refs["main"] == shared


def test_card_has_the_front_matter_and_all_that_a_reader_needs(hub: Hub, tiny_sd: TinyDiffusion, adapter: Adapter):
    adapter.push_to_hub(NAME, about=ABOUT, token=hub.owner)
    text = hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]][README].decode()
    card = huggingface_hub.ModelCard(text)
    assert card.data.license == "apache-2.0" and card.data.pipeline_tag == "text-to-image"
    assert card.data.base_model is None  # no repository
    assert [(one.metric_name, one.metric_value) for one in card.data.eval_results] == [("CT", 0.3), ("E-DI", 0.5)]
    assert card.data.eval_results[0].dataset_args == {"protocol": "0123456789abcdef"}
    for part in (
        "Photos of mugs.",
        "Mugs, not cups.",
        "protocol `0123456789abcdef`",
        "| base model | `tiny` |",
        "| its revision | `0` |",
        "| steps | 7 |",
        "| hash of the data | `d1` |",
        'CustomContrastPipeline.from_pretrained("tiny", adapter="ann/mugs")',
        "https://arxiv.org/abs/2409.05606",
    ):
        assert part in text
    assert len(text.split("```python\n")[1].split("\n```")[0].splitlines()) == 6


def test_card_names_a_base_model_of_the_hub_and_sdxl_s_pipeline(tiny_sdxl: TinyDiffusion, tmp_path: Path):
    diffusion = TinyDiffusion(**{**vars(tiny_sdxl), "name": "ann/base", "revision": "a" * 40})
    make_adapter(diffusion).save_pretrained(tmp_path)
    text = (tmp_path / README).read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "ann/base" and front["base_model_relation"] == "adapter"
    assert "license" not in front and "model-index" not in front
    assert 'CustomContrastXLPipeline.from_pretrained("ann/base"' in text and "Not stated." in text


def test_copy_of_a_fetched_adapter_keeps_its_card_and_says_whence(hub: Hub, shared: str, tmp_path: Path):
    found = Adapter.from_pretrained(f"{NAME}@{shared}")
    found.save_pretrained(tmp_path / "copy")
    assert json.loads((tmp_path / "copy" / CARD).read_text()) == found.card
    assert f"| copied from | `{NAME}@{shared}` |" in (tmp_path / "copy" / README).read_text()


@pytest.mark.parametrize("kind", ["tiny_sd", "tiny_sdxl"])
def test_pipelines_take_a_repository(hub: Hub, kind: str, request: pytest.FixtureRequest, tmp_path: Path):
    diffusion: TinyDiffusion = request.getfixturevalue(kind)
    adapter = make_adapter(diffusion)
    where = adapter.push_to_hub(NAME, private=True, token=hub.owner)
    built = build_pipeline(diffusion, adapter)
    loaded = stock(diffusion, built)
    around = type(built).from_pipe(loaded, adapter=where, token=hub.member)
    assert same(around.adapter, adapter) and around.adapter.source == where
    loaded.save_pretrained(tmp_path / "base")
    whole = type(built).from_pretrained(tmp_path / "base", adapter=NAME, token=hub.member)
    assert same(whole.adapter, adapter) and whole.adapter.source == where
    other = CustomContrastXLPipeline if kind == "tiny_sd" else CustomContrastPipeline
    with pytest.raises(ModelError):
        other.from_pipe(loaded, adapter=where, token=hub.member)


def test_offline_what_was_fetched_is_read_from_the_cache(hub: Hub, shared: str, monkeypatch: pytest.MonkeyPatch):
    Adapter.from_pretrained(NAME)
    asked = len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert Adapter.from_pretrained(NAME).source == f"{NAME}@{shared}"
    assert Adapter.from_pretrained(NAME, revision=shared, local_files_only=True).source == f"{NAME}@{shared}"
    assert len(hub.requests) == asked
    with pytest.raises(
        ModelError, match=r"^ann/cups: is not in the hub's cache, and the hub is not reachable; go online"
    ):
        Adapter.from_pretrained("ann/cups")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ModelError, match=r"^ann/cups: is not in the hub's cache at revision v1, and the hub is not"):
        Adapter.from_pretrained("ann/cups@v1", local_files_only=True)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match=r"^ann/cups: is not in the hub's cache, and the hub is not reachable"):
        Adapter.from_pretrained("ann/cups")


def gate(hub: Hub) -> None:
    hub.repositories[NAME].gated = True


def other_files(hub: Hub) -> None:
    hub.repository("ann/other").commit("main", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    hub.repository("ann/half").commit("main", {DESCRIPTION: hub.repositories[NAME].commits[head(hub)][DESCRIPTION]})
    spoilt = hub.repositories[NAME].commits[head(hub)] | {WEIGHTS: b"no safetensors"}
    hub.repository("ann/spoilt").commit("main", spoilt)


def head(hub: Hub) -> str:
    return hub.repositories[NAME].refs["main"]


@pytest.mark.parametrize(
    ("before", "source", "settings", "message"),
    [
        (None, "ann/cups", {}, "ann/cups: is no folder here, and the hub has no such repository, or a private one"),
        (None, "ann/cups", {"token": "reader"}, "you may not read; correct the name, or pass another token"),
        (None, NAME, {"revision": "v9"}, "ann/mugs: has no revision 'v9'; give a commit, tag or branch that it has"),
        (None, f"{NAME}@{'a' * 40}", {}, f"ann/mugs: has no revision '{'a' * 40}'"),
        (None, NAME, {"token": "hf_thisisnotone"}, "you may not read; correct the name, or pass another token"),
        (
            None,
            NAME,
            {"token": "hf_this isnotone"},
            "ann/mugs: the token is empty, or has a space, line break or other",
        ),
        (None, NAME, {"token": "hf_nöt"}, "ann/mugs: the token is empty, or has a space, line break or other"),
        (gate, NAME, {}, "ann/mugs: is a gated repository; accept its terms on its page at the hub, and log in with"),
        (gate, NAME, {"token": "reader"}, "accept its terms on its page at the hub, and pass another token"),
        (other_files, "ann/other", {}, "holds no adapter, as it has no adapter.json; give the repository of one"),
        (other_files, "ann/half", {}, "holds no adapter, as it has no adapter.safetensors"),
        (other_files, "ann/spoilt", {}, "adapter.safetensors: cannot be read as safetensors"),
        (None, NAME, {"base_model": "other"}, "was trained on base model 'tiny', but 'other' is loaded"),
        (None, NAME, {"base_revision": "9"}, "was trained on revision '0', but '9' is loaded"),
        (None, f"{NAME}@v1", {"revision": "v2"}, "ann/mugs@v1: revision 'v2' was given beside it; give one of the two"),
        (None, "cups", {"revision": "v2"}, "cups: revision 'v2' was given, but this is no repository; leave it out"),
        (None, "cups", {}, "cups/adapter.json: No such file or directory; pass the folder of a trained adapter"),
        (None, "a--b/x..y", {}, "a--b/x..y: is no name of a repository"),
    ],
)
def test_what_cannot_be_loaded_is_one_sentence(
    hub: Hub,
    shared: str,
    before: Callable[[Hub], None] | None,
    source: str,
    settings: dict[str, str],
    message: str,
):
    if before is not None:
        before(hub)
    if settings.get("token") == "reader":
        settings = {"token": hub.reader}
    with pytest.raises(ModelError) as caught:
        Adapter.from_pretrained(source, **settings)
    said = str(caught.value)
    assert message in said and "\n" not in said and "snapshots" not in said
    assert said.startswith(source.partition("@")[0])
    if "token" in settings:
        assert settings["token"] not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("name", "token", "message"),
    [
        (NAME, None, "ann/mugs: the hub allows no writing to it; log in with `hf auth login`, or pass token=, of an"),
        (NAME, "reader", "ann/mugs: the hub allows no writing to it; pass another token, of an account that may write"),
        ("ann/new", "reader", "ann/new: the hub allows no writing to it; pass another token"),
        ("mugs", "owner", "mugs: is no name of a repository; give owner/name, and a branch with branch="),
        (f"{NAME}@main", "owner", "ann/mugs@main: is no name of a repository; give owner/name, and a branch"),
    ],
)
def test_push_that_is_not_allowed_is_one_sentence(
    hub: Hub, shared: str, adapter: Adapter, name: str, token: str | None, message: str
):
    secret = {"reader": hub.reader, "owner": hub.owner, None: None}[token]
    with pytest.raises(ModelError) as caught:
        adapter.push_to_hub(name, token=secret)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert "ssecret" not in "".join(traceback.format_exception(caught.value))
    assert head(hub) == shared


def test_token_in_an_error_of_the_hub_is_hidden(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **settings: object) -> None:
        raise ValueError(f"bad header 'Bearer {settings['token']}', and hf_anothersecret") from OSError(hub.owner)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=r"bad header 'Bearer \*\*\*', and \*\*\*") as caught:
        Adapter.from_pretrained(NAME, token=hub.owner)
    told = "".join(traceback.format_exception(caught.value))
    assert hub.owner not in told and "hf_anothersecret" not in told


def test_full_disk_is_not_blamed_on_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    def write(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "cache/weights")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", write)
    with pytest.raises(ModelError, match=r"^ann/mugs: cache/weights: no space left on its disk; free some"):
        Adapter.from_pretrained(NAME)


def test_folder_takes_precedence_over_a_repository(hub: Hub, adapter: Adapter, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapter.save(tmp_path / NAME)
    assert Adapter.from_pretrained(NAME).source is None
    assert hub.requests == []


def test_card_that_is_no_json_is_one_sentence(adapter: Adapter, tmp_path: Path):
    adapter.save_pretrained(tmp_path)
    (tmp_path / CARD).write_text("{")
    with pytest.raises(ModelError, match=r"card.json: cannot be read as JSON .*; correct or remove it$"):
        Adapter.load(tmp_path)
    (tmp_path / CARD).write_text(json.dumps({"about": {"license": "mit"}}))
    with pytest.raises(ModelError, match=r"^card.json: about.data: Field required; correct or remove it$"):
        Adapter.load(tmp_path).save_pretrained(tmp_path / "copy")


def test_card_lists_the_photos_by_licence(adapter: Adapter, tmp_path: Path):
    photos = {"source": "views", "licence": "CC-BY-4.0", "photos": 12, "attribution": "Ann | Bo"}
    adapter.card = adapter.card | {"photos": [photos, photos | {"licence": "unknown", "attribution": None}]}
    adapter.save_pretrained(tmp_path)
    text = (tmp_path / README).read_text()
    assert "| 12 | `views` | CC-BY-4.0 | Ann / Bo |\n| 12 | `views` | unknown |  |" in text
    adapter.card = {}
    adapter.save_pretrained(tmp_path)
    assert "photos trained on" not in (tmp_path / README).read_text()
