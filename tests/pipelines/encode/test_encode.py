"""What is cached for training: latents, masks at the latent's size, hidden states of segments."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from model.backbones.features.source import FeatureParams, feature_source
from model.backbones.variant import load_variant
from model.images.inputs import encode_latents, shrink
from model.images.segment import on_white, square_crop
from pipelines import tables
from pipelines.encode.needs import Needed, RowSizes, photos_in_shard, sizes, within_budget
from pipelines.encode.stage import identity
from pipelines.encode.worker import EncodeParams, EncodeWorker
from pipelines.photos.roots import SourceParams
from runtime.digest import digest
from runtime.errors import ModelError
from tests.world import models as tiny_models
from tests.world.tables import MASK, mask, triplet, write

CLIP, TOWERS = FeatureParams(encoder="mfi"), FeatureParams(encoder="realcustom_pp")


def sizes_of(variant) -> RowSizes:
    return sizes(variant, feature_source(variant, "mfi"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(3):
        blocks = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        Image.fromarray(blocks).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def worker(section, photos) -> EncodeWorker:
    source = SourceParams(name="own", layout="folder", root=str(photos), split="train")
    return EncodeWorker(section("encode", EncodeParams, batch_size=4), CLIP, "toybox", [source], "cpu")


def frame(number: int = 0, single: bool = False, target: bool = True, given: bool = True) -> dict:
    extra = {"rle": tables.encode_mask(MASK), "height": 72, "width": 96, "single": single}
    extra |= {"target": target, "input": given}
    row = {"frame_id": f"s/a/{number}", "subject_id": "s/a", "source": "own", "path": f"{number}.png"}
    return row | {"extra": extra}


def test_latents_are_the_posterior_mean_times_the_scaling_factor():
    torch.manual_seed(0)
    vae = tiny_models.vae().eval().requires_grad_(False)
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(5)]
    found = encode_latents(vae, images, 2, "cpu")
    for latent, image in zip(found, images, strict=True):
        pixels = torch.tensor(np.array(image), dtype=torch.float32).permute(2, 0, 1)[None] / 127.5 - 1
        assert pixels.min() >= -1 and pixels.max() <= 1
        moments = vae.quant_conv(vae.encoder(pixels))
        plain = moments[0, : moments.shape[1] // 2] * vae.config.scaling_factor
        assert torch.allclose(torch.from_numpy(latent), plain, atol=1e-5)
    assert np.array_equal(encode_latents(vae, images[3:4], 2, "cpu")[0], found[3])


def test_latents_are_shifted_where_the_autoencoder_says_so():
    torch.manual_seed(0)
    vae = tiny_models.vae().eval().requires_grad_(False)
    image = Image.new("RGB", (16, 16), "red")
    plain = encode_latents(vae, [image], 1, "cpu")
    vae.register_to_config(shift_factor=0.25)
    shifted = encode_latents(vae, [image], 1, "cpu")
    assert shifted == pytest.approx(plain - 0.25 * vae.config.scaling_factor, abs=1e-5)


def test_shrunk_mask_says_how_much_of_each_cell_is_subject():
    mask = np.zeros((16, 24), dtype=bool)
    mask[:, 12:] = True
    mask[:4, 8:12] = True
    assert shrink(mask, 2, 3) / 255 == pytest.approx(np.array([[0, 0.75, 1], [0, 0.5, 1]]), abs=0.005)
    assert shrink(mask, 16, 24).tolist() == (mask * 255).tolist()
    assert shrink(np.ones((16, 24), dtype=bool), 2, 3).min() == 255


def test_shrunk_mask_keeps_the_area():
    rng = np.random.default_rng(0)
    mask = rng.random((64, 64)) < 0.3
    assert shrink(mask, 8, 8).mean() / 255 == pytest.approx(mask.mean(), abs=0.01)


def test_first_augmentation_is_the_plain_segment(worker):
    image = Image.open(worker.roots["own"].url + "/0.png")
    plain = on_white(image, MASK, margin=worker.params.margin)
    assert np.array_equal(np.asarray(worker.augment(frame(), image, MASK, 0)), np.asarray(plain))


def test_augmentations_are_the_same_each_time_and_differ_by_index_and_frame(worker):
    image = Image.open(worker.roots["own"].url + "/0.png")
    pictures = {}
    for key in [(n, index, single) for n in (0, 1) for index in (1, 2) for single in (False, True)]:
        number, index, single = key
        first, again = (worker.augment(frame(number, single), image, MASK, index) for _ in range(2))
        assert np.array_equal(np.asarray(first), np.asarray(again))
        assert first.size == (worker.variant.resolution,) * 2
        pictures[key] = first.tobytes()
    assert len(set(pictures.values())) == len(pictures)


def test_rows_do_not_depend_on_the_photos_that_come_along(worker):
    together = worker.compute([[frame(0), frame(1)], [frame(2)]])
    (alone,) = worker.compute([[frame(2)]])
    count = worker.params.augmentations
    assert [len(rows["features"]) for rows in together] == [2 * count, count]
    for name in ("latents", "features"):
        ids = [row["frame_id"] for rows in together for row in rows[name]]
        assert list(dict.fromkeys(ids)) == ["s/a/0", "s/a/1", "s/a/2"]
        assert tables.from_rows(name, alone[name]).equals(tables.from_rows(name, together[1][name]))
    assert [row["augmentation"] for row in alone["features"]] == list(range(count))


def test_latents_row_holds_the_crops_latent_and_mask(worker):
    (rows,) = worker.compute([[frame(1)]])
    (row,) = rows["latents"]
    image, mask = square_crop(Image.open(worker.roots["own"].url + "/1.png"), MASK, worker.variant.resolution)
    sizes = (row["channels"], row["height"], row["width"])
    latent = encode_latents(worker.vae, [image], worker.params.batch_size, "cpu")
    assert np.array_equal(row["latent"].reshape(sizes), latent[0].astype(np.float16))
    assert np.array_equal(row["subject_mask"].reshape(sizes[1:]), shrink(mask, *sizes[1:]))


def test_features_row_holds_the_chosen_layers(worker):
    (rows,) = worker.compute([[frame(1)]])
    row = rows["features"][0]
    view = worker.augment(frame(1), Image.open(worker.roots["own"].url + "/1.png"), MASK, 0)
    hidden = worker.encoder.hidden_states([view], worker.variant.image_encoder.layers)[0]
    assert (row["layers"], row["tokens"], row["width"]) == tuple(hidden.shape)
    assert np.allclose(row["hidden"], hidden.reshape(-1).numpy(), rtol=1e-2, atol=1e-3)


def test_features_of_two_towers_are_of_views_of_a_larger_square(section, photos):
    source = SourceParams(name="own", layout="folder", root=str(photos), split="train")
    worker = EncodeWorker(section("encode", EncodeParams, batch_size=2), TOWERS, "toybox", [source], "cpu")
    (rows,) = worker.compute([[frame(1)]])
    views = [worker.augment(frame(1), Image.open(photos / "1.png"), MASK, index) for index in (0, 1)]
    assert views[1].size == (128, 128)
    hidden = worker.encoder.hidden_states(views, range(5)).numpy()
    for row, expected in zip(rows["features"], hidden, strict=False):
        assert (row["layers"], row["tokens"], row["width"]) == expected.shape == (5, 64, 256)
        assert np.allclose(row["hidden"], expected.reshape(-1), rtol=1e-2, atol=1e-3)
    assert rows["features"][0]["hidden"].nbytes == sizes(worker.variant, worker.source).hidden


@pytest.fixture
def chosen(tmp_path):
    """Folders of the triplets and masks tables: two triplets, and masks of further photos."""
    ids, unusable = ("s/a/0", "s/a/1", "s/a/2", "s/a/3", "s/a/4", "s/b/0"), "s/a/3"
    write(tmp_path / "mask", "masks", [mask(i, quality="border" if i == unusable else "ok") for i in ids])
    single = triplet("s/b/000", "s/b/0", "s/b/0", "s/b/0", method="augment")
    write(tmp_path / "pairs", "triplets", [triplet("s/a/000", "s/a/0", "s/a/1", "s/a/2"), single])
    return tmp_path / "pairs", tmp_path / "mask"


def test_photos_of_triplets_are_encoded_by_their_roles_and_no_others(section, chosen):
    pairs, masks = chosen

    def wanted(**switches) -> dict[str, dict]:
        params = section("encode", EncodeParams, **switches)
        return dict(Needed.read(pairs, masks, params).wanted(params, masks))

    def roles(**switches) -> dict[str, tuple]:
        return {name: (row["input"], row["target"], row["single"]) for name, row in wanted(**switches).items()}

    two = ("reference", "positive")
    assert roles(inputs=two) == {
        "s/a/0": (True, False, False),
        "s/a/1": (True, False, False),
        "s/a/2": (False, True, False),
        "s/b/0": (True, True, True),
    }
    assert roles(inputs=(*two, "target"))["s/a/2"] == (True, True, False)
    assert wanted()["s/a/0"]["rle"] == tables.encode_mask(MASK)
    assert list(wanted(inputs=two, latents=False)) == ["s/a/0", "s/a/1", "s/b/0"]
    assert list(wanted(inputs=("target",), latents=False)) == ["s/a/2", "s/b/0"]
    assert list(wanted(hidden_states=False)) == list(wanted(inputs=())) == ["s/a/2", "s/b/0"]
    assert not wanted(hidden_states=False)["s/b/0"]["input"]
    assert wanted(latents=False, hidden_states=False) == {}


@pytest.mark.parametrize("decoders", [0, 2])
def test_targets_get_latents_and_inputs_hidden_states(decoders, section, photos):
    """The batches of both fill at other times, and a thread ahead changes no row."""
    frames = [frame(n % 3, target=n % 2 == 0, given=n % 3 != 0) | {"frame_id": f"s/{n:02d}/0"} for n in range(11)]
    params = section("encode", EncodeParams, batch_size=2)
    source = SourceParams(name="own", layout="folder", root=str(photos), split="train")
    rows = EncodeWorker(params, CLIP, "toybox", [source], "cpu", decoders).compute([[f] for f in frames])
    plain = EncodeWorker(params, CLIP, "toybox", [source], "cpu")
    one_by_one = [result for f in frames for result in plain.compute([[f]])]
    for found, given in zip(rows, frames, strict=True):
        roles = given["extra"]
        assert [r["frame_id"] for r in found["latents"]] == [given["frame_id"]] * roles["target"]
        numbers = [r["augmentation"] for r in found["features"]]
        assert numbers == (list(range(params.augmentations)) if roles["input"] else [])
    for name in ("latents", "features"):
        for found, alone in zip(rows, one_by_one, strict=True):
            assert tables.from_rows(name, found[name]).equals(tables.from_rows(name, alone[name]))


def test_hidden_states_of_a_shard_can_be_counted_in_32_bits(section):
    """ViT-H: three layers of 257 tokens of 1280 values."""
    values = 3 * 257 * 1280
    params, row = section("encode", EncodeParams, augmentations=3), RowSizes(latent=0, hidden=2 * values)
    most = photos_in_shard(params, row)
    assert most * 3 * values < 2**31 <= (most + 1) * 3 * values
    assert photos_in_shard(params, RowSizes(latent=0, hidden=2**40)) == 1


@pytest.mark.parametrize("name", ["latents", "hidden_states"])
def test_what_is_switched_off_is_neither_loaded_nor_written(name, section, photos, tmp_path):
    params = section("encode", EncodeParams, **{name: False})
    source = SourceParams(name="own", layout="folder", root=str(photos), split="train")
    worker = EncodeWorker(params, CLIP, "toybox", [source], "cpu")
    assert (worker.vae is None, worker.encoder is None) == (name == "latents", name == "hidden_states")
    (rows,) = worker.compute([[frame()]])
    written = {"latents": len(rows["latents"]), "hidden_states": len(rows["features"])}
    assert written == {"latents": 1, "hidden_states": params.augmentations} | {name: 0}


def test_sizes_known_before_the_models_are_loaded_are_those_of_their_rows(worker):
    told = sizes(worker.variant, worker.source)
    (rows,) = worker.compute([[frame()]])
    (latent,) = rows["latents"]
    assert told.latent == latent["latent"].nbytes + latent["subject_mask"].nbytes
    assert {row["hidden"].nbytes for row in rows["features"]} == {told.hidden}


def test_sizes_of_published_models_are_about_those_of_the_architecture(tmp_path):
    """512 px latents, and three layers of ViT-H: 3 x 257 x 1280 fp16."""
    for part, tree in (
        ("clip/open_clip_config", {"model_cfg": {"vision_cfg": {"image_size": 224, "patch_size": 14, "width": 1280}}}),
        ("sd/vae/config", {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4}),
    ):
        file = tmp_path / f"{part}.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(tree))
    variant = load_variant("sd15")
    paths = {"image_encoder": str(tmp_path / "clip"), "diffusion": str(tmp_path / "sd")}
    changed = {name: getattr(variant, name).model_copy(update={"path": path}) for name, path in paths.items()}
    told = sizes_of(variant.model_copy(update=changed))
    assert told == RowSizes(latent=64 * 64 * (2 * 4 + 1), hidden=2 * 3 * 257 * 1280)
    (tmp_path / "clip" / "open_clip_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"clip: cannot be read as an open_clip folder") as caught:
        sizes_of(variant.model_copy(update=changed))
    assert "\n" not in str(caught.value)


def test_sizes_are_told_and_hidden_states_above_the_budget_are_left_out(section, capsys):
    place = np.arange(1000)
    needed = Needed(target=place < 400, input=place >= 100, single=place < 0)
    row = RowSizes(latent=36_864, hidden=1_973_760)
    within, above = (section("encode", EncodeParams, augmentations=2, max_gigabytes=limit) for limit in (4, 3.5))
    assert within_budget(within, row, needed) == within
    told = capsys.readouterr().out
    assert "latents of 400 targets x 36.9 KB = 0.01 GB" in told
    assert "hidden states of 900 inputs x 2 augmentations x 1973.8 KB = 3.55 GB\n" in told
    assert within_budget(above, row, needed) == above.model_copy(update={"hidden_states": False})
    assert "= 3.55 GB, left out: more than encode.max_gigabytes = 3.5; " in capsys.readouterr().out
    off = section("encode", EncodeParams, latents=False, hidden_states=False)
    assert within_budget(off, row, needed) == off
    assert capsys.readouterr().out.count("switched off by encode.") == 2


def test_rows_of_another_variant_seed_or_layer_are_computed_anew_and_of_another_budget_are_not(section):
    params, variant = section("encode", EncodeParams), load_variant("toybox")

    def here(params=params, reader=CLIP, **changes) -> str:
        changed = variant.model_copy(update=changes)
        return digest(identity(params, changed, reader.source(changed)))

    encoder = variant.image_encoder.model_copy(update={"layers": (1, 2)})
    for other in (
        here(resolution=128),
        here(image_encoder=encoder),
        here(section("encode", EncodeParams, seed=1)),
        here(reader=TOWERS),
    ):
        assert other != here()
    assert here(section("encode", EncodeParams, max_gigabytes=1.0)) == here(reader=FeatureParams(encoder="x")) == here()
