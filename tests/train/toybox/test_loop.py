import json

import torch
from torch import Tensor, nn

from train.toybox.loop import cards, loop
from train.toybox.loop.muon import Muon, orthogonalised

STEPS = 12


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.2), nn.GELU(), nn.Linear(16, 2))


def train(run, steps, precision, stop_after=None):
    """Train the small network; stop_after kills the run in the middle of the step of that number."""
    model = network()
    recipe = loop.Recipe(steps=steps, lr=1e-2, batch=8, warmup=3, precision=precision, log=4, every=0.0)

    def loss(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        if draw.step == stop_after:
            raise KeyboardInterrupt
        x = torch.from_numpy(draw.rng.standard_normal((draw.batch, 6), dtype="float32"))
        x = (x + 0.1 * torch.randn(x.shape, generator=draw.noise)).to(draw.device, next(model.parameters()).dtype)
        return (model(x).float() - 1).square().mean(), {"twice": 2.0}

    try:
        loop.fit(model, loss, recipe, run)
    except KeyboardInterrupt:
        return None
    return {name: value.cpu() for name, value in model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_killed_run_ends_with_the_same_weights_bit_for_bit(tmp_path):
    for precision in ("float32", "bfloat16"):
        whole = train(tmp_path / f"whole-{precision}", STEPS, precision)
        assert train(tmp_path / f"parts-{precision}", STEPS, precision, stop_after=5) is None
        assert torch.load(tmp_path / f"parts-{precision}" / "checkpoint.pt", weights_only=True)["step"] == 5
        parts = train(tmp_path / f"parts-{precision}", STEPS, precision)
        assert equal(whole, parts)
        assert not equal(whole, network().state_dict())


def test_finished_run_is_not_trained_further(tmp_path):
    first = train(tmp_path, STEPS, "float32")
    assert equal(first, train(tmp_path, STEPS, "float32"))


def test_zero_minutes_gives_the_average_and_writes_nothing(tmp_path):
    trained = train(tmp_path, STEPS, "float32")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    model = network()

    def never(draw: loop.LessonDraw) -> tuple[Tensor, dict[str, float]]:
        raise AssertionError("a step was taken")

    loop.fit(model, never, loop.Recipe(steps=2 * STEPS, lr=1e-2), tmp_path, minutes=0)
    assert equal(trained, {name: value.cpu() for name, value in model.state_dict().items()})
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_card_tells_how_far_the_training_came(tmp_path):
    run, recipe = tmp_path / "small", loop.Recipe(steps=2 * STEPS, lr=1e-2, batch=8)
    train(run, STEPS, "float32")
    cards.write(tmp_path, run, recipe, [], {"right": 0.5})
    card = json.loads((tmp_path / "card.json").read_text())
    assert (card["steps"], card["samples"]) == (STEPS, STEPS * 8)
    assert card["losses"]["step"] == STEPS and card["recipe"]["steps"] == 2 * STEPS
    assert card["parameters"] == sum(p.numel() for p in network().parameters())


def test_every_log_line_is_the_mean_over_its_steps(tmp_path):
    train(tmp_path, STEPS, "float32")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert all(line["twice"] == 2.0 for line in lines)


def test_rate_rises_to_its_peak_and_falls_to_its_floor():
    recipe = loop.Recipe(steps=100, lr=1.0, warmup=10, floor=0.02)
    rates = [recipe.rate(step) for step in range(101)]
    assert rates[9] == 1.0 == max(rates)
    assert abs(rates[100] - 0.02) < 1e-9
    assert sorted(rates[10:], reverse=True) == rates[10:]


SHAPES = ((8, 20), (20, 8), (8, 20), (5, 5))


def muon_run(optimizer, params, steps=6):
    noise = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=noise)
        optimizer.step()
    return params


def matrices():
    noise = torch.Generator().manual_seed(4)
    return [torch.randn(shape, generator=noise) for shape in SHAPES]


def test_muon_is_torchs_own_up_to_the_rounding_of_bfloat16():
    ours, theirs = matrices(), matrices()
    muon_run(Muon(ours, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16), ours)
    published = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    muon_run(published, theirs)
    for before, a, b in zip(matrices(), ours, theirs, strict=True):
        assert (a - b).norm() < 0.02 * (a - before).norm()


def test_orthogonalised_is_the_polynomial_of_the_singular_values():
    matrix = torch.randn(3, 7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, b, c = 3.4445, -4.7750, 2.0315
    found = orthogonalised(matrix, (a, b, c), 5, 1e-7, torch.float64)
    u, s, v = torch.linalg.svd(matrix / matrix.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    torch.testing.assert_close(found, u @ torch.diag_embed(s) @ v)


def test_muon_goes_on_from_torchs_state():
    half = matrices()
    first = torch.optim.Muon(half, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    muon_run(first, half, 1)
    second = Muon(half, lr=0.02, weight_decay=0.1, dtype=torch.bfloat16)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.state[half[0]]["momentum_buffer"], first.state[half[0]]["momentum_buffer"])


def test_a_cpu_without_bfloat16_computes_in_float32(monkeypatch):
    cpu = torch.device("cpu")
    for supported, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda there=supported: {"avx512_bf16": there})
        assert loop.fast_dtype(cpu) == dtype
    assert loop.fast_dtype(torch.device("cuda")) == torch.bfloat16
