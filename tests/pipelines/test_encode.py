"""What is cached for training: latents, masks at the latent's size, hidden states of segments."""

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from model.segment import on_white, square_crop
from params import UserError
from pipelines import encode, tables
from pipelines.encode import EncodeParams, EncodeWorker, encode_latents, needed_frames, shrink, tell_size
from pipelines.storage import SourceParams


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
    torch.set_num_threads(1)
    source = SourceParams(name="own", layout="folder", root=str(photos), split="train")
    return EncodeWorker(section("encode", EncodeParams, batch_size=4), "toybox", [source], "cpu")


def shape() -> np.ndarray:
    mask = np.zeros((72, 96), dtype=bool)
    mask[12:60, 20:50] = True
    return mask


def frame(number: int = 0, single: bool = False) -> dict:
    extra = {"rle": tables.encode_mask(shape()), "height": 72, "width": 96, "single": single}
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
    plain = on_white(image, shape(), margin=worker.params.margin)
    assert np.array_equal(np.asarray(worker.augment(frame(), image, shape(), 0)), np.asarray(plain))


def test_augmentations_are_the_same_each_time_and_differ_by_index_and_frame(worker):
    image = Image.open(worker.roots["own"].url + "/0.png")
    pictures = {}
    for key in [(n, index, single) for n in (0, 1) for index in (1, 2) for single in (False, True)]:
        number, index, single = key
        first, again = (worker.augment(frame(number, single), image, shape(), index) for _ in range(2))
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
    image, mask = square_crop(Image.open(worker.roots["own"].url + "/1.png"), shape(), worker.variant.resolution)
    sizes = (row["channels"], row["height"], row["width"])
    latent = encode_latents(worker.vae, [image], worker.params.batch_size, "cpu")
    assert np.array_equal(row["latent"].reshape(sizes), latent[0].astype(np.float16))
    assert np.array_equal(row["subject_mask"].reshape(sizes[1:]), shrink(mask, *sizes[1:]))


def test_features_row_holds_the_chosen_layers(worker):
    (rows,) = worker.compute([[frame(1)]])
    row = rows["features"][0]
    view = worker.augment(frame(1), Image.open(worker.roots["own"].url + "/1.png"), shape(), 0)
    hidden = worker.encoder.hidden_states([view], worker.variant.image_encoder.layers)[0]
    assert (row["layers"], row["tokens"], row["width"]) == tuple(hidden.shape)
    assert np.allclose(row["hidden"], hidden.reshape(-1).numpy(), rtol=1e-2, atol=1e-3)


def write_triplets(folder, triplets: list[tuple[str, str, str, str]]) -> None:
    rows = [
        {"triplet_id": f"s/a/{n:03d}", "subject_id": "s/a", "class_name": "mug", "method": method}
        | {"reference": r, "positive": p, "target": t}
        | {"reference_target_angle": None, "reference_positive_angle": None}
        for n, (r, p, t, method) in enumerate(triplets)
    ]
    tables.write(folder, "triplets", tables.from_rows("triplets", rows))


def write_masks(folder, qualities: dict[str, str]) -> None:
    rows = [
        {"frame_id": frame_id, "phrase": "mug", "method": "annotated", "box": [0.0, 0.0, 1.0, 1.0], "score": 1.0}
        | {"height": 72, "width": 96, "rle": tables.encode_mask(shape()), "mask_score": 1.0, "area": 0.2}
        | {"border_contact": 0.0, "quality": quality}
        for frame_id, quality in qualities.items()
    ]
    tables.write(folder, "masks", tables.from_rows("masks", rows))


def test_triplet_is_dropped_whole_where_one_of_its_masks_is_unusable(tmp_path):
    write_masks(tmp_path / "mask", {"s/0": "ok", "s/1": "ok", "s/2": "ok", "s/3": "border", "s/5": "ok"})
    triplets = [
        ("s/0", "s/1", "s/2", "pose"),
        ("s/0", "s/1", "s/3", "pose"),
        ("s/3", "s/1", "s/2", "pose"),
        ("s/0", "s/4", "s/2", "pose"),
        ("s/5", "s/5", "s/5", "augment"),
    ]
    write_triplets(tmp_path / "curate", triplets)
    needed, dropped = needed_frames(tmp_path / "curate", tmp_path / "mask")
    assert dropped == 3
    assert {name: row["single"] for name, row in needed.items()} == {
        "s/0": False,
        "s/1": False,
        "s/2": False,
        "s/5": True,
    }
    assert needed["s/0"]["rle"] == tables.encode_mask(shape())


def test_run_that_would_write_more_than_allowed_is_refused_in_one_sentence(worker, capsys):
    tell_size(worker, 1000, limit=50)
    told = capsys.readouterr().out
    (rows,) = worker.compute([[frame()]])
    stored = sum(row["hidden"].nbytes for row in rows["features"])
    stored += sum(row["latent"].nbytes + row["subject_mask"].nbytes for row in rows["latents"])
    total = float(told.split("= ")[1].split(" GB")[0])
    assert stored * 1000 / 1e9 <= total + 0.005 and total <= 1.5 * stored * 1000 / 1e9 + 0.005
    with pytest.raises(UserError, match=r"would write [\d.]+ GB, more than encode.max_gigabytes = 0.001") as caught:
        tell_size(worker, 1000, limit=0.001)
    assert "\n" not in str(caught.value)


def test_blank_picture_is_enough_to_know_the_sizes(worker):
    assert encode.BLANK.mode == "RGB"
    assert worker.encoder.hidden_states([encode.BLANK], (1,)).shape[0] == 1
