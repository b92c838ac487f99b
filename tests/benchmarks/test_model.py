"""The model's benchmark on tiny shapes: every part runs, and what it counts is what is there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Line, cost
from benchmarks.model import command
from benchmarks.model import infer as inference
from benchmarks.model import train as training
from benchmarks.model.command import PARTS
from benchmarks.model.setting import MASKED, ModelSetting, build_adapter, ip_adapter_plus, twin
from benchmarks.model.train import MASKED_STEPS, Weight, bare_step, effects, our_step, plus_step
from model.dry.build import build_diffusion, tokenizer
from model.dry.memory import LiveTensors, imagined, peak_bytes, saved_bytes
from model.dry.shapes import TINY, TINY_TEXT, TINY_XL
from model.pipeline.pipeline import CustomContrastPipeline
from runtime.errors import ModelError
from tests.world.commands import run

pytestmark = pytest.mark.xdist_group("bench-model")

CPU = torch.device("cpu")
SETTING = ModelSetting(
    steps=2,
    text_every=2,
    repeats=1,
    size=None,
    batch=2,
    dtype=torch.float32,
    device=CPU,
    gradient_checkpointing="text",
    compile=False,
)
WORDS = ["--shapes", "tiny", "--repeats", "1", "--device", "cpu", "--steps", "2", "--text-every", "2", "--batch", "2"]
"""Command-line options with the same values."""


@pytest.fixture(scope="module", autouse=True)
def counted_once() -> Iterator[None]:
    """Counts on fake tensors take seconds and depend on their arguments alone, so all tests share them."""

    def once(count: Callable[..., Any]) -> Callable[..., Any]:
        found: dict[tuple[Any, ...], Any] = {}

        def counted(*arguments: Any) -> Any:
            *things, setting = arguments
            key = (*map(id, things), replace(setting, compile=False))  # nothing is compiled when counting
            if key not in found:
                found[key] = count(*arguments)
            return found[key]

        return counted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inference, "operations", once(inference.operations))
        patch.setattr(inference, "masked_operations", once(inference.masked_operations))
        patch.setattr(inference, "needed_bytes", once(inference.needed_bytes))
        patch.setattr(training, "operations", once(training.operations))
        patch.setattr(Weight, "of", once(Weight.of))
        yield


@pytest.mark.parametrize("part", PARTS)
def test_every_part_prints_its_goals_and_writes_its_figures(part, tmp_path, capsys):
    code = run(command, [part, *WORDS, "--json", str(tmp_path / "figures.json")])
    written = json.loads((tmp_path / "figures.json").read_text())
    figures = {figure["name"]: figure for figure in written["figures"]}
    masked = {
        "infer": {"FLOP realcustom over three UNet rows": 1.05, "FLOP realcustom_pp over two UNet rows": 1.3},
        "train": {f"{of}{way} over ip-adapter": 1.0 for of in ("", "FLOP ") for way in ("realcustom", "realcustom_pp")},
    }
    others = {"infer": {"ip-adapter": 1.1, "stock": 1.2}, "train": {"ip-adapter": 1.0, "bare UNet": 1.5}}
    goals = {f"{part} over {other}": goal for other, goal in others[part.removeprefix("sdxl-")].items()}
    if part.endswith("infer"):
        goals |= {f"{name}, text_every 2": goal for name, goal in goals.items()}
        counted = f"{part} FLOP over ip-adapter"
        assert 1 < figures[f"{counted}, text_every 2"]["value"] < figures[counted]["value"]
        # Three rows at 25 steps, and 62 where there would be 50.
        assert figures[f"{part} FLOP realcustom over three UNet rows"]["value"] > 1
        assert figures[f"{part} FLOP realcustom_pp over two UNet rows"]["value"] > 62 / 50
    else:
        goals |= {
            f"{part} memory over ip-adapter": 1.15,
            f"{part} GB, 16 px": 24,
            f"{part} GB, 16 px, checkpointed": 24,
        }
    goals |= {f"{part} {name}": goal for name, goal in masked[part.removeprefix("sdxl-")].items()}
    assert {name: figure["goal"] for name, figure in figures.items() if figure["goal"] is not None} == goals
    assert all(figure["value"] > 0 for figure in figures.values())
    assert code == (0 if all(figure["ok"] for figure in figures.values()) else 1)
    printed = capsys.readouterr().out
    assert all(f"\n{name:34} " in printed for name in figures)
    assert written["asked"]["shapes"] == "tiny" and written["machine"]["device"] == "cpu"


def test_operations_alone_are_neither_timed_nor_weighed(tmp_path, monkeypatch):
    for module in (inference, training):
        monkeypatch.setattr(module, "turns", None)
    monkeypatch.setattr(Weight, "of", None)
    file = tmp_path / "figures.json"
    run(command, [*PARTS, *WORDS, "--operations", "--json", str(file)])
    names = [figure["name"] for figure in json.loads(file.read_text())["figures"]]
    assert names and all(" FLOP " in name for name in names)
    assert {name.split()[0] for name in names} == set(PARTS)


def test_options_have_their_effect_printed(monkeypatch):
    compiled = []
    monkeypatch.setattr(UNet2DConditionModel, "compile", lambda unet: compiled.append(unet))
    asked = replace(SETTING, gradient_checkpointing="all", compile=True, dtype=torch.bfloat16)
    found = {line.name: line for line in effects("train", TINY, asked)}
    names = ["checkpointing all time", "checkpointing all memory", "compile time", "bfloat16 time", "bfloat16 memory"]
    assert list(found) == [f"train {name}" for name in names]
    # Both steps of a pair where something else is asked, one where it is compiling.
    assert len(compiled) == 2 + 1 + 2
    assert found["train checkpointing all memory"].value < 1 and found["train bfloat16 memory"].value < 1

    none = {line.name: line for line in effects("train", TINY, replace(SETTING, gradient_checkpointing="none"))}
    assert list(none) == ["train checkpointing none time", "train checkpointing none memory"]
    assert none["train checkpointing none memory"].value > 1


def test_without_checkpointing_the_captions_are_kept():
    kept = [
        Weight.of(our_step, TINY, replace(SETTING, gradient_checkpointing=mode)).saved
        for mode in ("none", "text", "all")
    ]
    assert kept[0] > kept[1] > kept[2]


def test_what_does_not_fit_says_its_size_and_is_not_run(monkeypatch):
    monkeypatch.setattr(inference, "free_bytes", lambda device: 10)
    monkeypatch.setattr(training, "free_bytes", lambda device: 10)
    monkeypatch.setattr(training, "compare", pytest.fail)
    monkeypatch.setattr(training, "card", lambda *_: [])
    *counted, line = inference.infer("sdxl-infer", TINY_XL, SETTING)
    assert len(counted) == 6 and all("FLOP" in one.name for one in counted)
    assert line.name == "sdxl-infer does not fit" and line.value > 0 and not line.short
    assert "GB are needed and 0.0 are free" in line.detail
    names = [line.name for line in training.train("train", TINY, SETTING)]
    assert names[:2] == ["train FLOP over ip-adapter", "train FLOP over bare UNet"]
    assert names[2:4] == [f"train FLOP {method} over ip-adapter" for method in MASKED]
    assert names[4:] == ["train does not fit", "train memory over ip-adapter", "train peak over ip-adapter"]


@pytest.mark.parametrize("make", [our_step, plus_step, bare_step, *MASKED_STEPS.values()])
def test_imagined_step_weighs_what_the_real_one_does(make):
    step = make(TINY, SETTING, build_diffusion(TINY, torch.float32, CPU))
    weight = Weight.of(make, TINY, SETTING)
    assert weight.saved == saved_bytes(step.loss, step.modules)
    assert weight.moving == pytest.approx(peak_bytes(step.both_ways, CPU), rel=0.05)
    with FlopCounterMode(display=False) as counted:
        step.both_ways()
    assert training.operations(make, TINY, SETTING) == counted.get_total_flops()
    frozen = sum(p.numel() for module in step.modules for p in module.parameters() if not p.requires_grad)
    assert weight.frozen == 4 * frozen


def test_imagined_operations_are_those_of_real_samplings(monkeypatch):
    # Location maps are kept from a timestep on, which has no value when imagined.
    defaults = CustomContrastPipeline.__call__.__wrapped__.__kwdefaults__
    monkeypatch.setitem(defaults, "location_masks", False)
    found = inference.operations(TINY, SETTING)
    for key, work in inference.samplers(TINY, replace(SETTING, steps=SETTING.text_every)).items():
        if key in MASKED:
            continue
        with FlopCounterMode(display=False) as counted:
            work()
        assert counted.get_total_flops() == SETTING.text_every * found[key]
    assert found["stock"] < found["ip-adapter"] < found["shared"] < found["ours"]


def test_three_short_calls_tell_what_a_long_one_costs():
    """RealCustom and RealCustom++ at the published number of steps, really sampled."""
    found = inference.masked_operations(TINY, SETTING)
    ways = inference.samplers(TINY, replace(SETTING, steps=inference.STEPS))
    for method in MASKED:
        with FlopCounterMode(display=False) as counted:
            ways[method]()
        assert counted.get_total_flops() == found[method]
    with FlopCounterMode(display=False) as counted:
        ways["stock"]()
    assert counted.get_total_flops() > 2 * SETTING.batch * inference.STEPS * found["row"]


def test_saved_bytes_count_a_storage_once_and_no_weight():
    layer, x = nn.Linear(8, 8, bias=False), torch.randn(4, 8, requires_grad=True)

    def forward() -> torch.Tensor:
        y = layer(x)  # saves x and the weight
        return y * y  # saves y twice

    assert saved_bytes(forward, [layer]) == 2 * 4 * 8 * 4


def test_live_tensors_are_counted_while_they_live():
    given = torch.zeros(100)
    with LiveTensors() as live:
        view = given.view(10, 10)
        first = view + 1
        del first
        second = view + 1
        second += 1
    assert live.peak == live.now == 400 == second.nbytes


def test_imagined_tensors_have_no_values():
    with imagined():
        weights = torch.empty(10**6, 10**6)
        assert weights.nbytes == 4 * 10**12


@pytest.mark.parametrize("shapes", [TINY, TINY_XL], ids=["sd", "sdxl"])
def test_rivals_share_the_weights_and_leave_our_unet_alone(shapes):
    diffusion = build_diffusion(shapes, torch.float32, CPU)
    build_adapter(shapes, diffusion)
    unet = diffusion.unet
    before = dict(unet.attn_processors)
    plus, trained = ip_adapter_plus(shapes, unet)
    assert {id(p) for p in plus.parameters() if p.requires_grad} == {id(p) for p in trained}
    ours = {p.data_ptr() for p in unet.parameters()}
    assert {p.data_ptr() for p in plus.parameters() if not p.requires_grad} == ours
    assert {p.data_ptr() for p in twin(unet).parameters()} == ours
    assert dict(unet.attn_processors) == before


def test_tokenizer_has_the_vocabulary_that_is_asked():
    words = tokenizer(TINY_TEXT["vocab_size"], TINY_TEXT["max_position_embeddings"])
    assert len(words) == TINY_TEXT["vocab_size"] and words.eos_token_id == TINY_TEXT["vocab_size"] - 1


def test_cost_is_the_median_of_the_ratios_and_short_above_its_goal():
    line = cost("c", [2.0, 3.0, 9.0], [1.0, 2.0, 3.0], 2, "step", 1.5)
    assert line == Line("c", 2.0, 1.5, most=True, detail="1500.0 of 1000.0 ms/step, 3 repeats") and line.short


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inference"], "no part 'inference'; choose from infer, train"),
        (["--batch", "0"], "--batch is 0; give at least 1"),
        (["--text-every", "0"], "--text-every is 0; give at least 1"),
    ],
)
def test_bad_options_are_one_sentence(words, message):
    with pytest.raises(ModelError, match=message):
        run(command, words)
