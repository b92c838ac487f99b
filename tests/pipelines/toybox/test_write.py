import csv
import hashlib
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.transform import Rotation

from pipelines.toybox import world
from pipelines.toybox.layouts import prompts
from pipelines.toybox.stage import ToyboxParams, is_complete, world_of, write_world
from runtime.errors import UserError
from tests.world.faces import FACES


def small(**changes: object) -> ToyboxParams:
    values = {
        "root": "unused",
        "seed": 3,
        "size": 48,
        "mvimgnet_subjects": 4,
        "mvimgnet_views": 5,
        "scene_per_view": True,
        "openimages_photos": 6,
        "dreambench_subjects": 3,
        "dreambench_photos": 2,
        "caption_detail": "noun",
        "world": "toys",
        "faces": FACES,
    }
    return ToyboxParams.model_validate(values | changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toybox") / "world"
    assert write_world(folder, small())
    return folder


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_same_seed_same_bytes(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "again", small())
    assert digest(tmp_path / "again") == digest(root)
    write_world(tmp_path / "other", small(seed=4))
    assert digest(tmp_path / "other") != digest(root)


def test_a_larger_world_keeps_the_pictures_of_the_smaller(root: Path, tmp_path: Path) -> None:
    write_world(tmp_path / "more", small(mvimgnet_subjects=5, openimages_photos=8))
    for path in root.glob("*imag*/**/*.jpg"):
        assert (tmp_path / "more" / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_a_complete_world_is_left_alone_and_other_params_replace_it(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "world"
    assert write_world(folder, small(openimages_photos=2))
    assert not write_world(folder, small(openimages_photos=2))
    assert write_world(folder, small(openimages_photos=3))
    assert is_complete(folder, small(openimages_photos=3))
    assert [p.name for p in tmp_path.iterdir()] == ["world"]


def test_half_a_world_is_never_seen(tmp_path: Path) -> None:
    def killed(layout: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_world(tmp_path / "world", small(), killed)
    assert not (tmp_path / "world").exists()
    assert write_world(tmp_path / "world", small())


def test_a_world_of_other_params_than_these_is_to_be_rendered_again(root: Path, tmp_path: Path) -> None:
    assert world_of(root / "dreambench") is not None
    record = json.loads((root / "world.json").read_text())
    (tmp_path / "dreambench").mkdir()
    del record["params"]["world"]
    (tmp_path / "world.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="was rendered by other code than this; run the toybox stage again"):
        world_of(tmp_path / "dreambench")


def test_foreign_files_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not a toybox world"):
        write_world(tmp_path, small())
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_captions_name_every_photo_and_its_class(root: Path) -> None:
    for layout in ("mvimgnet", "openimages", "dreambench"):
        rows = read_table(root / layout / "captions.csv")
        assert sorted(r["path"] for r in rows) == sorted(
            str(p.relative_to(root / layout)) for p in (root / layout).rglob("*.jpg")
        )
        for row in rows:
            assert set(row["caption"].replace(",", " ,").split()) & set(world.FAMILIES)
            assert set(row["caption"].replace(",", " ,").split()) <= set(world.VOCABULARY)


Pose = tuple[np.ndarray, np.ndarray, list[tuple[float, float, int]]]


def read_colmap(
    folder: Path,
) -> tuple[
    tuple[float, ...],
    dict[str, Pose],
    dict[int, tuple[np.ndarray, list[tuple[int, int]]]],
]:
    """PINHOLE params, poses and 2D points by image name, points with their tracks."""

    def reader(name: str):  # type: ignore[no-untyped-def]
        data, at = (folder / name).read_bytes(), 0

        def take(form: str) -> tuple[float, ...]:
            nonlocal at
            values = struct.unpack_from("<" + form, data, at)
            at += struct.calcsize("<" + form)
            return values

        return take, lambda: at == len(data)

    take, ended = reader("cameras.bin")
    assert take("Q") == (1,)
    assert take("ii") == (1, 1)
    width, height, *camera = take("QQ4d")
    assert ended() and (width, height) == (48, 48)

    take, ended = reader("images.bin")
    images: dict[str, Pose] = {}
    for number in range(1, int(take("Q")[0]) + 1):
        head = take("i7di")
        assert head[0] == number and head[8] == 1
        name = b""
        while (letter := take("c")[0]) != b"\0":
            name += letter  # type: ignore[operator]
        spots = [take("ddq") for _ in range(int(take("Q")[0]))]
        rotation = Rotation.from_quat([*head[2:5], head[1]]).as_matrix()
        images[name.decode()] = (
            rotation,
            np.array(head[5:8]),
            [(x, y, int(p)) for x, y, p in spots],
        )
    assert ended()

    take, ended = reader("points3D.bin")
    points: dict[int, tuple[np.ndarray, list[tuple[int, int]]]] = {}
    for _ in range(int(take("Q")[0])):
        number, x, y, z, *_ = take("Q3d3Bd")
        points[int(number)] = (
            np.array([x, y, z]),
            [take("ii") for _ in range(int(take("Q")[0]))],
        )  # type: ignore[misc]
    assert ended()
    return tuple(camera), images, points


def test_mvimgnet_layout_round_trips(root: Path) -> None:
    base = root / "mvimgnet"
    lines = (base / "mvimgnet_category.txt").read_bytes().split(b"\r\n")
    assert [line.decode().split(",")[1] for line in lines if line] == list(world.FAMILIES)
    videos = sorted(base.glob("*/*/images"))
    assert len(videos) == 4
    for folder in (images.parent for images in videos):
        assert re.fullmatch(r"\d+/[0-9a-f]{8}", str(folder.relative_to(base)))
        (fx, fy, cx, cy), poses, points = read_colmap(folder / "sparse/0")
        assert sorted(poses) == [f"{k:03d}.jpg" for k in range(5)]
        assert len(points) >= 50
        names = sorted(poses)
        for name, (rotation, translation, spots) in poses.items():
            mask = np.asarray(Image.open(folder / "masks" / name.replace("jpg", "png")))
            assert mask.dtype == np.uint8 and set(np.unique(mask)) == {0, 255}
            assert Image.open(folder / "images" / name).size == (48, 48)
            for place, (x, y, number) in enumerate(spots):
                p = rotation @ points[number][0] + translation
                assert np.allclose([fx * p[0] / p[2] + cx, fy * p[1] / p[2] + cy], [x, y])
                assert mask[int(y), int(x)] == 255
                assert (names.index(name) + 1, place) in points[number][1]
        assert all(len(track) >= 2 for _, track in points.values())
        azimuths = np.sort([np.degrees(np.arctan2(r[2, 0], r[2, 2])) % 360 for r, _, _ in poses.values()])
        assert np.diff(azimuths, append=azimuths[0] + 360).max() < 150


def test_one_scene_per_capture_by_parameter(tmp_path: Path) -> None:
    write_world(tmp_path / "w", small(scene_per_view=False))
    scenes: dict[str, set[str]] = {}
    for row in read_table(tmp_path / "w/mvimgnet/captions.csv"):
        said = row["caption"].replace("a photo of ", "")
        place = re.sub(r"^(.*), an? \w+$|^an? \w+ (.*)$", lambda m: m[1] or m[2], said)
        scenes.setdefault(row["path"].split("/")[1], set()).add(place)
    assert all(len(places) == 1 for places in scenes.values())


def test_openimages_layout_is_consistent(root: Path) -> None:
    base = root / "openimages"
    names = {r["LabelName"]: r["DisplayName"] for r in read_table(base / "oidv7-class-descriptions-boxable.csv")}
    assert [name.lower() for name in names.values()] == list(world.FAMILIES)
    boxes = read_table(base / "oidv6-train-annotations-bbox.csv")
    masks = {r["ImageID"]: r for r in read_table(base / "train-annotations-object-segmentation.csv")}
    listed = read_table(base / "train-images-boxable-with-rotation.csv")
    assert len(boxes) == len(listed) == len(masks) == 6
    for row in boxes:
        assert re.fullmatch("[0-9a-f]{16}", row["ImageID"])
        assert (base / "train" / f"{row['ImageID']}.jpg").is_file()
        other = masks[row["ImageID"]]
        label = row["LabelName"].replace("/", "")
        assert other["MaskPath"] == f"{row['ImageID']}_{label}_{other['BoxID']}.png"
        mask = np.asarray(Image.open(base / "train-masks" / other["MaskPath"])) > 0
        rows, columns = np.nonzero(mask)
        found = (columns.min(), columns.max() + 1, rows.min(), rows.max() + 1)
        assert np.allclose(
            [float(row[k]) * 48 for k in ("XMin", "XMax", "YMin", "YMax")],
            found,
            atol=0.01,
        )
        assert names[row["LabelName"]]


def test_dreambench_layout_matches_the_real_file(root: Path) -> None:
    text = (root / "dreambench/dataset/prompts_and_classes.txt").read_text()
    assert text.startswith("Classes\n\nsubject_name,class\n")
    block = text.split("\n\nPrompts\n\n")[0].splitlines()[3:]
    assert sorted(p.name for p in (root / "dreambench/dataset").iterdir() if p.is_dir()) == [
        line.split(",")[0] for line in block
    ]
    assert all(line.split(",")[1] in world.FAMILIES for line in block)
    lists = re.findall(r"(Object|Live Subject) Prompts\n\nprompt_list = (\[\n.*?\n\])", text, re.DOTALL)
    assert [name for name, _ in lists] == ["Object", "Live Subject"]
    for (_, source), live in zip(lists, (False, True), strict=True):
        said = eval(source, {"unique_token": "sks", "class_token": "mug"})
        assert said == [p.format("sks", "mug") for p in prompts(live)]
        assert len(set(said)) == 25
        assert all(set(p.split()) - {"sks"} <= set(world.VOCABULARY) for p in said)
    for folder in (root / "dreambench/dataset").glob("*/"):
        assert sorted(p.name for p in folder.iterdir()) == ["00.jpg", "01.jpg"]


def test_the_record_tells_the_params_without_the_place(root: Path) -> None:
    record = json.loads((root / "world.json").read_text())
    assert record["params"]["seed"] == 3
    assert str(root) not in (root / "world.json").read_text()
