"""What the backbones of the world of faces are trained with."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers import Dinov2Model

from model.backbones.features.face import load_faces
from model.backbones.variant import FaceSpec, RecogniserSpec
from pipelines.toybox.faces import people
from runtime.digest import digest_files
from train.toybox.lessons import data, tokens
from train.toybox.lessons.boxes import boxes_of
from train.toybox.lessons.faces import ATTRIBUTES, EDITS, FACES, PHRASES, SETS, celebrities
from train.toybox.lessons.toys import TOYS
from train.toybox.loop import loop
from train.toybox.models import clip, detector, face, text_to_image, vae
from train.toybox.models.face import Margin, margin_logits


def items(count: int, name: str = "pictures") -> list[people.Portrait]:
    return [SETS[name].item(i * 7) for i in range(count)]


def table_of(portraits: list[people.Portrait]) -> np.ndarray:
    return np.array([FACES.row(item) for item in portraits], np.int16)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["angle", "cosine"])
def test_logits_are_arcface_s_and_cosface_s(kind, share):
    noise = torch.Generator().manual_seed(1)
    vectors, centres = (torch.randn(n, 5, dtype=torch.float64, generator=noise) for n in (6, 4))
    vectors[0] = -centres[1] + 0.01  # almost opposite its own centre, where angle + m is beyond pi
    who, margin = torch.tensor([1, 0, 2, 3, 1, 0]), Margin(kind, 0.3, 30.0)
    found = margin_logits(vectors, centres, who, margin, share)
    for i, vector in enumerate(vectors.numpy()):
        for j, centre in enumerate(centres.numpy()):
            cosine = float(vector @ centre / np.linalg.norm(vector) / np.linalg.norm(centre))
            m = 0.3 * share
            if j == who[i] and kind == "cosine":
                cosine -= m
            elif j == who[i]:
                angle = math.acos(cosine)
                cosine = math.cos(angle + m) if angle + m <= math.pi else cosine - m * math.sin(m)
            assert found[i, j].item() == pytest.approx(30 * cosine, abs=1e-2 if i == 0 else 1e-9)


def test_the_margin_lowers_the_right_person_alone_and_has_a_gradient_everywhere():
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.6, 0.8]], requires_grad=True)
    centres = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    who = torch.tensor([0, 0, 1])
    for kind in ("angle", "cosine"):
        plain, found = (margin_logits(vectors, centres, who, Margin(kind, 0.3, 30.0), share) for share in (0.0, 1.0))
        gap = plain - found
        assert (gap.gather(1, who[:, None]) > 0).all()
        assert torch.equal(gap.scatter(1, who[:, None], 0.0), torch.zeros_like(gap))
        (gradient,) = torch.autograd.grad(F.cross_entropy(found, who), vectors)
        assert gradient.isfinite().all()


def test_a_person_s_images_follow_each_other_and_people_for_evaluation_are_in_no_training_set():
    views = SETS["views"]
    assert views.item(5) == views.item(5)
    assert views.item(0)[0] == views.item(views.views - 1)[0] != views.item(views.views)[0]
    assert {name for name, spec in SETS.items() if spec.who == "held out"} == {"judged", "pictures-test", "views-test"}
    for name, spec in SETS.items():
        assert all(people.held_out(spec.person(i)) == (spec.who == "held out") for i in range(20)), name
    assert len({spec.seed for spec in SETS.values()}) == len(SETS)
    assert [views.person(i) for i in range(9)] != [SETS["metric-views"].person(i) for i in range(9)]


def test_captions_of_a_celebrity_hold_the_name_and_those_of_others_none():
    name, who = celebrities()[3]
    spec = SETS["celebrities"]
    first = 3 * spec.views
    assert spec.item(first)[0] == who
    for index in range(first, first + 6):
        said = spec.captions(index)
        assert len(said) == len(people.TEMPLATES) * len(FACES.details)
        assert all(name in caption and who.noun not in caption.split() for caption in said)
    words = {word for name in FACES.names for word in name.split()}
    assert len(words) == 2 * people.CELEBRITIES
    for index in range(40):
        full, noun = SETS["pictures"].captions(index)[:2]
        assert not words & set(full.split())
        assert SETS["pictures"].item(index)[0].noun in noun.split()


def test_bald_people_get_no_other_hair_colour():
    found = [SETS["pictures"].item(i) for i in range(400)]
    bald = [outfit for who, _, outfit in found if who.hair == "bald"]
    assert len(bald) > 20 and not any(outfit.hair_colour for outfit in bald)
    assert any(outfit.hair_colour for _, _, outfit in found)


def test_what_a_prompt_asks_is_what_its_caption_says():
    rng, met = np.random.default_rng(0), set()
    for _ in range(150):
        said, row = FACES.prompt(rng, True)
        asked = FACES.asked(np.array([row], np.int16))[0]
        value = {name: values[at] for (name, values), at in zip(ATTRIBUTES.items(), row, strict=True)}
        named = {name for name, there in zip(ATTRIBUTES, asked, strict=True) if there}
        met |= named
        assert value["noun"] in said.split()
        assert not {"skin", "iris"} & named
        for name in named & {"wear", "hair_colour"}:
            assert value[name] in said.split(), said
        assert ("expression" in named) == (value["expression"] != "neutral")
        if "expression" in named:
            assert people.EXPRESSIONS[value["expression"]].words in said
        if "beard" in named:
            assert value["beard"] in said.split()
        assert value["hair"] != "bald" or "hair_colour" not in named
    assert met == {*EDITS, "noun", "hair", "beard"}


def test_what_an_image_hides_is_not_asked_of_the_judge():
    who = replace(SETS["pictures"].person(0), hair="long")
    view = people.sample_portrait_view(np.random.default_rng(1))

    def hidden(person=who, **outfit) -> set[str]:
        row = np.array([FACES.row((person, view, people.Outfit("beach", **outfit)))], np.int16)
        return {name for name, shown in zip(ATTRIBUTES, FACES.visible(row)[0], strict=True) if not shown}

    assert hidden() == set()
    assert hidden(person=replace(who, hair="bald")) == {"hair_colour"}
    assert hidden(job="chef") == hidden(accessory="hat") == {"hair"}
    assert hidden(accessory="glasses") == set()
    assert hidden(style="sketch") == {"skin", "iris", "hair_colour", "wear"}
    assert hidden(style="sketch", accessory="glasses") == {"skin", "iris", "hair_colour"}


def test_captions_that_tell_less_are_true_of_more_images():
    row = torch.zeros(len(ATTRIBUTES), dtype=torch.long)
    other, skin = row.clone(), row.clone()
    other[list(ATTRIBUTES).index("hair")] = 1
    skin[list(ATTRIBUTES).index("skin")] = 1
    both = torch.stack([row, other])
    assert clip.agree(FACES, both, ["full", "full"]).tolist() == [[True, False], [False, True]]
    assert clip.agree(FACES, both, ["noun", "noun"]).all()
    assert clip.agree(FACES, torch.stack([row, skin]), ["full", "full"]).all()  # no caption tells the skin


def test_the_detector_is_asked_for_heads_people_and_what_is_not_there():
    table = table_of(items(300))
    question = FACES.ask(table, np.random.default_rng(0))
    said, nouns = np.array(FACES.phrases)[question.phrase], np.array(people.NOUNS)[FACES.column(table, "noun")]
    right = question.shown
    assert 0.7 < right.mean() < 0.9
    assert {"head", "person", "man", "woman"} == set(said[right])
    assert (question.whole == (said != "head"))[right].all()
    gendered = right & np.isin(said, people.NOUNS)
    assert (said[gendered] == nouns[gendered]).all()
    assert not np.isin(said[~right], ["head", "person"]).any() and (said[~right] != nouns[~right]).all()
    assert set(said[~right]) > {"man", "woman", "mug"}
    regions = np.zeros((300, 8, 8), np.uint8)
    regions[:, 1:4, 2:5], regions[:, 4:8, 1:7] = data.SUBJECT, data.WORN
    boxes = detector.boxes_asked(regions, question)
    assert (boxes[question.whole] == [1, 1, 7, 8]).all() and (boxes[~question.whole] == [2, 1, 5, 4]).all()
    exam, wrong = FACES.examine(table, np.random.default_rng(0))
    assert exam.shown.all() and (exam.phrase != wrong).all()
    assert (FACES.subject_phrase(table) == PHRASES.index("head")).all()
    assert {*FACES.vocabulary, *FACES.phrases} <= {*detector.vocabulary(FACES), "a", ","}


def test_heads_are_the_subject_and_clothes_are_worn():
    drawn = people.render(items(2))
    masks = drawn.subject_masks.numpy()
    whole = boxes_of(drawn.masks.numpy())
    assert (boxes_of(masks)[:, 3] <= whole[:, 3]).all() and drawn.masks.sum() > masks.sum() * 1.1


def test_names_are_two_tokens_and_captions_fit_the_text_encoder(tmp_path):
    words = [word for name in FACES.names for word in name.split()]
    stock = tokens.write_tokenizer(tmp_path, [*FACES.vocabulary, *words])
    for name in FACES.names[:20]:
        assert len(stock(name)["input_ids"]) == 4
    for index in range(0, 400, 3):
        for said in (*SETS["pictures"].captions(index)[:1], *SETS["celebrities"].captions(index)[:1]):
            ids = stock(said)["input_ids"]
            assert len(ids) == len(said.replace(",", " ,").split()) + 2 <= tokens.LENGTH


def test_text_to_image_starts_as_the_toys_and_keeps_the_words_that_both_know(tmp_path):
    stock = tokens.write_tokenizer(tmp_path, ["beach", "bemo", *FACES.vocabulary])
    torch.manual_seed(0)
    model = text_to_image.TextToImage(len(stock))
    new = model.text.get_input_embeddings().weight.detach().clone()
    text_to_image.start_from_toys(model, stock)
    toys = text_to_image.paint.load_pipeline(TOYS)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(toys.unet.parameters(), model.unet.parameters(), strict=True))
    rows, old = model.text.get_input_embeddings().weight, toys.text_encoder.get_input_embeddings().weight.cpu()
    for word in ("beach</w>", "photo</w>", "<|endoftext|>"):
        assert torch.equal(rows[stock.get_vocab()[word]], old[toys.tokenizer.get_vocab()[word]])
    for word in ("bemo</w>", "goatee</w>"):
        assert torch.equal(rows[stock.get_vocab()[word]], new[stock.get_vocab()[word]])


def test_rows_of_sets_take_their_shares():
    rng = np.random.default_rng(0)
    rows = text_to_image.rows_of([10, 1000], [0.75, 0.25], 4000, rng)
    assert rows.min() == 0 and rows.max() > 900 and (rows < 1010).all()
    assert (rows < 10).mean() == pytest.approx(0.75, abs=0.03)
    one = text_to_image.rows_of([50], [1.0], 30, np.random.default_rng(3))
    assert (one == np.random.default_rng(3).integers(0, 50, 30)).all()  # toys': the same batches as ever


def test_the_autoencoder_is_a_link_and_counts_in_the_digest(tmp_path, monkeypatch):
    toys = tmp_path / "toys" / "vae"
    toys.mkdir(parents=True)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (toys / name).write_text("one")
    monkeypatch.setattr(vae, "FOLDER", toys)
    place = tmp_path / "faces" / "diffusion" / "vae"
    for _ in range(2):
        text_to_image.link_autoencoder(place)
    assert (place / "config.json").read_text() == "one"
    assert (place / "config.json").readlink() == Path("../../../toys/vae/config.json")
    before = digest_files(tmp_path / "faces")
    (toys / "config.json").write_text("two")
    assert digest_files(tmp_path / "faces") != before


def few_views() -> data.Pictures:
    """Twelve images of noise."""
    spec, rng = replace(SETS["views"], subjects=3, views=4), np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    regions = np.zeros((12, 64, 64), np.uint8)
    regions[:, 16:48, 16:48] = data.SUBJECT
    return data.Pictures(FACES, spec, images, regions, np.zeros((12, len(ATTRIBUTES)), np.int16), "")


def test_statistics_of_a_batch_norm_are_those_of_the_final_weights():
    torch.manual_seed(0)
    net, views = face.build(face.METRIC), few_views()
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    face.settle(net, views, 1.0, 2)
    first = [norm.running_mean.clone() for norm in norms]
    assert any(mean.abs().max() > 1e-3 for mean in first) and not net.training
    net.train()(torch.randn(4, 3, 64, 64))  # a step of training moves them
    face.settle(net, views, 1.0, 2)
    assert all(torch.equal(a, norm.running_mean) for a, norm in zip(first, norms, strict=True))


@pytest.mark.parametrize("plan", [face.FACE, face.METRIC], ids=lambda plan: plan.name)
def test_a_recogniser_is_read_as_any_other(plan, tmp_path, monkeypatch):
    torch.manual_seed(0)
    net = face.build(plan)
    face.settle(net, few_views(), plan.cut, 1)
    monkeypatch.setattr(face.RecogniserPlan, "folder", property(lambda self: tmp_path))
    monkeypatch.setattr(face, "measure", lambda net: {"auc": 1.0})
    monkeypatch.setattr(face.cards, "write", lambda *card: None)
    training = loop.Training(FACES, plan.recipe, None)
    face.export(plan, net, few_views(), training)
    photo = Image.fromarray(few_views().images[0])
    own = face.vectors_of(net, face.to_planes(torch.from_numpy(few_views().images[:1])))
    faces = load_faces(RecogniserSpec(path=str(tmp_path)), "cpu")
    found = faces.embed([faces.preprocess(photo)])
    assert (found * own).sum() > 0.999 and found.shape == (1, face.WIDTH)
    if plan is face.FACE:
        layered = load_faces(FaceSpec(path=str(tmp_path), layers=(1, 3, 5)), "cpu")
        assert layered.hidden_states([photo], (0,)).shape == (1, 1, 1, 3 * 128 + face.WIDTH)


def test_the_recogniser_starts_from_the_toys_dino_and_the_other_from_nothing():
    known = Dinov2Model.from_pretrained(face.FACE.start, dtype=torch.float32).state_dict()
    net = face.build(face.FACE).network.state_dict()
    assert all(torch.equal(weight, known[name]) for name, weight in net.items())
    assert face.METRIC.start is None


def test_a_step_of_the_optimizer_turns_a_person_s_centre():
    """AdamW moves a number by at most the rate: a centre of length 11, as a new embedding's, would stand still."""
    model = face.RecogniserInTraining(face.build(face.METRIC), 50)
    steps = model.centres.weight.norm(dim=1) / (face.METRIC.recipe.lr * face.WIDTH**0.5)
    assert steps.max() < 100


def test_the_two_recognisers_share_nothing():
    one, other = face.FACE, face.METRIC
    assert one.config["model_type"] != other.config["model_type"] and one.margin.kind != other.margin.kind
    assert one.people != other.people and one.recipe.seed != other.recipe.seed


def test_the_nearest_centre_names_the_person():
    centres = torch.tensor([[2.0, 0.0], [0.0, 0.1]])
    assert face.nearest(F.normalize(torch.tensor([[0.9, 0.4], [0.4, 0.9]]), dim=1), centres).tolist() == [0, 1]
    prompts = list(face.name_prompts(FACES))
    assert len(prompts) == face.ASKED * people.CELEBRITIES
    assert all(FACES.names[who] in said for said, who, _ in prompts)
