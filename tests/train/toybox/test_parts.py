"""The pieces the trainings are made of."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPTokenizer

from pipelines.toybox import world
from train.toybox import clip, data, dino, tokens
from train.toybox.attention import plain_attention
from train.toybox.augment import degrade, on_white
from train.toybox.boxes import boxes_of, iou, jitter


def test_stock_clip_tokenizer_reads_every_word_as_one_token(tmp_path):
    tokens.write_tokenizer(tmp_path)
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    for word in world.VOCABULARY:
        start, one, end = stock(word)["input_ids"]
        assert stock.convert_ids_to_tokens(one) == word + tokens.STOP
        assert (start, end) == (stock.bos_token_id, stock.eos_token_id)
    assert stock.eos_token_id == len(stock) - 1


def test_captions_survive_the_tokenizer_and_fit_its_length(tmp_path):
    stock = tokens.write_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    for _ in range(200):
        subject = world.sample_subject(rng)
        look = world.sample_look(rng, style=0.5, shape=0.5, accessory=0.5, family=subject.family)
        said = world.caption(subject, look, rng=rng)
        ids = stock(said)["input_ids"]
        assert len(ids) <= tokens.LENGTH
        assert stock.decode(ids[1:-1]).replace(" ,", ",") == said


def test_unknown_words_are_spelled_and_not_lost(tmp_path):
    stock = tokens.write_tokenizer(tmp_path)
    ids = stock("a zebra*")["input_ids"]
    assert stock.unk_token_id not in ids[1:-1]
    assert stock.decode(ids[1:-1]).replace(" ", "") == "azebra*"


def test_item_depends_on_its_index_alone_and_views_share_a_subject():
    spec = data.SETS["views-test"]
    assert spec.item(5) == spec.item(5)
    subjects = [spec.item(i)[0] for i in range(2 * spec.views)]
    assert len(set(subjects)) == 2
    assert subjects[0] == subjects[spec.views - 1] != subjects[spec.views]
    assert all(world.held_out(subject) for subject in subjects)


def test_killed_rendering_goes_on_to_the_same_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BLOCK", 2)
    spec = data.SetSpec("small", 1, 3, 2, False, style=0.5, shape=0.2, accessory=0.5)
    monkeypatch.setitem(data.SETS, "small", spec)
    data.prepare(spec, tmp_path / "whole", processes=1)
    whole = data.open_set("small", tmp_path / "whole")

    def die(job, draw=data._block):
        if job[1] == 4:
            raise KeyboardInterrupt
        draw(job)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "_block", die)
        data.prepare(spec, tmp_path / "parts", processes=1)
    data.prepare(spec, tmp_path / "parts", processes=1)
    parts = data.open_set("small", tmp_path / "parts")
    assert whole.digest == parts.digest
    assert np.array_equal(whole.regions, parts.regions)
    assert len(set(whole.captions(0))) > 4


def test_boxes_are_tight_and_an_empty_mask_gives_zeros():
    masks = np.zeros((2, 8, 8), bool)
    masks[0, 2:5, 1:7] = True
    boxes = boxes_of(masks)
    assert boxes.tolist() == [[1, 2, 7, 5], [0, 0, 0, 0]]
    assert iou(boxes, boxes).tolist() == [1, 0]
    moved = jitter(boxes, 0.5, 8, np.random.default_rng(0))
    assert ((moved >= 0) & (moved <= 8)).all()


def test_cut_out_fills_the_square_on_white():
    images = torch.full((1, 64, 64, 3), 200, dtype=torch.uint8)
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    images[:, 20:30, 10:30], masks[:, 20:30, 10:30] = 0, True
    cut = on_white(images, masks, None)
    dark = cut.mean(1)[0] < 128
    assert dark[:, 6:58].any(0).all()
    assert cut[0, :, :8].min() == 255
    assert dark.sum() == pytest.approx(64 * 64 / 1.2**2 / 2, rel=0.1)


def test_degraded_pictures_keep_range_and_shape():
    images = torch.randint(0, 256, (4, 64, 64, 3), dtype=torch.uint8)
    x = degrade(images, np.random.default_rng(0), 1.0)
    assert x.shape == (4, 3, 64, 64)
    assert x.min() >= 0 and x.max() <= 255
    same = degrade(images, np.random.default_rng(0), 0.0)
    assert torch.equal(same, images.permute(0, 3, 1, 2).float())


def test_plain_attention_equals_the_fused_one():
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.rand(7, 7) > 0.3
    mask |= torch.eye(7, dtype=torch.bool)
    for options in ({}, {"is_causal": True}, {"attn_mask": mask}, {"attn_mask": torch.randn(7, 7)}, {"scale": 0.3}):
        assert torch.allclose(
            plain_attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options), atol=1e-5
        )


def test_caption_agrees_with_pictures_that_differ_only_in_what_it_leaves_out():
    row = torch.zeros(len(data.ATTRIBUTES), dtype=torch.long)
    other_pattern = row.clone()
    other_pattern[list(data.ATTRIBUTES).index("pattern")] = 1
    both = torch.stack([row, other_pattern])
    assert clip.agree(both, ["full", "full"]).tolist() == [[True, False], [False, True]]
    assert clip.agree(both, ["colour", "noun"]).all()


def test_same_subject_loss_falls_as_views_come_together():
    subjects = torch.tensor([0, 0, 1, 1])
    apart = torch.eye(4)
    together = torch.eye(2).repeat_interleave(2, 0)
    assert dino.same_subject_loss(together, subjects) < 0.01 < dino.same_subject_loss(apart, subjects)


def test_area_under_curve_of_separate_mixed_and_swapped_scores():
    low, high = torch.tensor([0.1, 0.2]), torch.tensor([0.3, 0.4])
    assert dino.area_under_curve(high, low) == 1
    assert dino.area_under_curve(low, high) == 0
    assert dino.area_under_curve(torch.tensor([0.1, 0.4]), torch.tensor([0.2, 0.3])) == 0.5
