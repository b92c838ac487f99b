"""What the benchmark's figures are made of."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from transformers import MMGroundingDinoForObjectDetection

from benchmarks import forwards
from benchmarks.data import checkpoints, engine, export, export_scale, videos
from benchmarks.data.engine import busy_rate
from benchmarks.data.photos import draw
from benchmarks.data.setting import DataSetting, Sizes
from benchmarks.measure import Line, ratio
from model.backbones.grounded_sam import load_grounded_sam
from model.backbones.identity import spec_digest
from model.backbones.segmenters.sam2 import Sam2Segmenter
from model.backbones.variant import load_variant
from pipelines.engine import actors
from runtime.params import Params
from tests.world.exports import compute_here
from tests.world.shard_workers import on_cpus


def test_line_is_short_of_a_least_or_a_most_and_never_without_a_goal():
    assert Line("rate", 0.7, 0.8).short and not Line("rate", 0.8, 0.8).short
    assert Line("cost", 0.9, 0.8, most=True).short and not Line("cost", 0.8, 0.8, most=True).short
    assert not Line("photos", 0.0).short


def test_ratio_is_the_bare_time_over_ours():
    line = ratio("r", lambda: time.sleep(0.04), lambda: time.sleep(0.02), 10, "photo", 0.8, 3)
    assert line.value == pytest.approx(0.5, abs=0.2) and line.short


def test_rate_counts_only_while_every_worker_is_busy():
    """One worker ends at 4 s and one begins at 2 s: of 2 photos a second and 1, two seconds count."""
    assert busy_rate(["0 2 4\n2 4 4", "2 4 2\n4 6 2"]) == pytest.approx(3.0)
    assert busy_rate(["0 2 4\n2 4 4"]) == pytest.approx(2.0)


def test_checkpoints_are_the_same_each_time_and_load_as_what_they_are(tmp_path):
    variant = load_variant("toybox")
    detector, sam = checkpoints.mm_grounding_dino(variant.detector, tmp_path), checkpoints.sam2(tmp_path)
    first = [spec_digest(spec) for spec in (detector, sam)]
    again = [checkpoints.mm_grounding_dino(variant.detector, tmp_path), checkpoints.sam2(tmp_path)]
    assert [spec_digest(spec) for spec in again] == first
    models = load_grounded_sam(detector, sam, "cpu", batch_size=1)
    assert isinstance(models.detector.model, MMGroundingDinoForObjectDetection)
    assert isinstance(models.sam, Sam2Segmenter)
    found, cut = models.cut_one(draw(3, (64, 64))[0], "mug")
    assert found is not None and cut is not None


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.seen: list[tuple[torch.Tensor, bool]] = []

    def forward(self, x: torch.Tensor, *, scale: float) -> torch.Tensor:
        self.seen.append((x.clone(), torch.is_autocast_enabled("cpu")))
        return self.layer(x) * scale


def test_forward_passes_are_repeated_with_the_inputs_and_precision_they_had():
    model = Inner()

    def work() -> None:
        pixels = torch.ones(2, 3)
        model(pixels, scale=2.0)
        pixels += 1  # what the caller does with its tensors later is not repeated
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(pixels, scale=1.0)

    calls = forwards.record(work)
    assert [call.module for call in calls] == [model, model]  # the layer inside is not a call of its own
    first, model.seen = model.seen, []
    forwards.replay(calls)
    assert all(torch.equal(a, b) and f == g for (a, f), (b, g) in zip(first, model.seen, strict=True))
    assert [autocast for _, autocast in model.seen] == [False, True]


def test_drawn_photos_are_the_same_each_time_and_differ_from_each_other():
    image, mask = draw(3, (64, 48))
    assert image.size == mask.size == (64, 48)
    assert image.tobytes() == draw(3, (64, 48))[0].tobytes() != draw(4, (64, 48))[0].tobytes()
    assert 0.1 < sum(mask.getdata()) / 255 / (64 * 48) < 0.5


def test_stage_of_a_benchmark_runs_in_a_folder_of_its_own_each_time(tmp_path, monkeypatch):
    monkeypatch.setattr(actors, "compute", compute_here)
    for _ in range(2):
        done = engine.run(tmp_path / "bench", on_cpus("unused"), engine.IdleWorker, engine.idle_items(9), 4)
        assert (done.input, done.kept, done.items_computed) == (9, 0, 9)


def test_memory_of_exports_is_measured_on_tables_in_which_each_photo_is_a_target(tmp_path, capsys):
    for pairs in (40, 300):
        export_scale.write(tmp_path / str(pairs), pairs)
    found = export_scale.measure(tmp_path, 40, 300)
    assert "40 train pairs of 1 subjects" in (printed := capsys.readouterr().out), printed
    assert "300 train pairs of 10 subjects" in printed and "left out" not in printed
    assert found["many"] >= found["few"] > 0 and found["seconds"] > 0


def test_export_is_measured_on_shards_of_drawn_photos(tmp_path):
    sizes = dict.fromkeys(Sizes.model_fields, 1) | {"photos": 16, "side": 128, "source": None, "rows": (1,)}
    setting = DataSetting.of(Sizes(**sizes | {"work": tmp_path}), Params.read())
    source, items = export.shards(setting)
    assert sum(map(export.count_pairs, (item.payload for item in items))) == 16
    worker = export.ExportWorker(export.FORMAT, export.OPTIONS, [source], str(tmp_path / "out"))
    assert [len(rows["exports"]) for rows in worker.compute([items[0].payload])] == [16]


def test_video_of_the_benchmark_is_one_whose_frames_are_chosen_and_read_again(tmp_path):
    sizes = dict.fromkeys(Sizes.model_fields, 1) | {"photos": 24, "side": 64, "source": None, "rows": (1,)}
    setting = DataSetting.of(Sizes(**sizes | {"work": tmp_path}), Params.read())
    lines = list(videos.video(setting))
    assert [line.detail.partition(", ")[2] for line in lines] == ["24 frames", "24 frames"]
