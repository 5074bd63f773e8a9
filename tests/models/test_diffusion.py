"""Diffusion models: captions, the denoising loss, sampling, eight bits, adapters, and learning a word."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tunesmith
from tests.zoo import same
from tunesmith.core.layer import kind_of
from tunesmith.core.meters import saved_bytes
from tunesmith.core.seeds import generator
from tunesmith.errors import ModelError
from tunesmith.models import diffusion as D
from tunesmith.models.embedded import WEIGHTS
from tunesmith.models.loader import load_model
from tunesmith.models.pretrain import unet
from tunesmith.optimizers.zo_personalization import ZOPersonalization
from tunesmith.world.images import digits


@pytest.fixture
def model() -> D.Diffusion:
    """A random model: what is tested here holds whatever it has learnt."""
    return unet.build(seed=0).eval()


@pytest.fixture(scope="module")
def trained() -> D.Diffusion:
    return D.load("tiny-unet")


def given(n: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Images, noise and timesteps."""
    g = generator("given")
    images = unet.pixels(digits("heldout")[0][:n])
    return images, torch.randn(images.shape, generator=g), torch.randint(1000, (n,), generator=g)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Captions -------------------------------------------------------------------------------------------------------------


def test_a_caption_does_not_depend_on_those_beside_it(model: D.Diffusion) -> None:
    images, noise, timesteps = given(2)
    alone = [
        model.loss(images[i : i + 1], [c], noise[i : i + 1], timesteps[i : i + 1])
        for i, c in enumerate(("", "a seven"))
    ]
    beside = model.loss(images, ["", "a seven"], noise, timesteps)
    assert torch.allclose(beside, torch.stack(alone).mean(), atol=1e-5)
    states, mask = model.captions(["a photo of a thin seven", "Seven"])
    assert states.shape == (2, 7, 128)
    assert mask.tolist() == [[True] * 7, [True] * 2 + [False] * 5]
    table = model.captions.table.weight
    assert torch.equal(states[1, :2], table[[1, model.captions.words.index("seven")]])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a sevn"], "unknown word 'sevn'. Did you mean 'seven'"),
        (["<pad> seven"], "unknown word '<pad>'"),
        (["a a a a a a a a"], "has 8 words, and at most 7 fit"),
        ("seven", "expected a list of captions"),
    ],
)
def test_captions_that_cannot_be_read_are_refused(model: D.Diffusion, captions: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model.captions(captions)


def test_a_new_word_begins_as_another_and_is_all_that_trains(model: D.Diffusion, tmp_path: Path) -> None:
    images, noise, timesteps = given()
    row = model.captions.add_word("<mine>", like="seven")
    assert [name for name, p in model.captions.named_parameters() if p.requires_grad] == ["own.0"]
    assert row.dtype == torch.float32
    as_before = [model.loss(images, [word] * 4, noise, timesteps) for word in ("a seven", "a <mine>")]
    assert torch.equal(*as_before)
    with torch.no_grad():
        row += 0.5
    assert not torch.equal(model.loss(images, ["a <mine>"] * 4, noise, timesteps), as_before[0])
    assert torch.equal(model.loss(images, ["a seven"] * 4, noise, timesteps), as_before[0])
    second = model.captions.add_word("<other>", like="<mine>")
    assert torch.equal(row, second)
    assert [name for name, p in model.captions.named_parameters() if p.requires_grad] == ["own.1"]
    model.captions.save_word("<mine>", tmp_path / "word.safetensors")
    assert {k: v.tolist() for k, v in load_file(tmp_path / "word.safetensors").items()} == {"<mine>": row.tolist()}
    fresh = unet.build(seed=0).eval()
    assert fresh.captions.load_words(tmp_path / "word.safetensors") == ["<mine>"]
    assert torch.equal(*(m.loss(images, ["a <mine>"] * 4, noise, timesteps) for m in (model, fresh)))
    model.save_pretrained(tmp_path)
    again = D.load(tmp_path)
    assert again.captions.words[-2:] == ["<mine>", "<other>"]
    assert same(weights(again), weights(model))


def test_words_that_cannot_be_are_refused(model: D.Diffusion, tmp_path: Path) -> None:
    for word in ("seven", "two words", "", "Upper", "<pad>"):
        with pytest.raises(ModelError, match="single lower-case word that is new"):
            model.captions.add_word(word, like="seven")
    with pytest.raises(ModelError, match="unknown word 'dog'"):
        model.captions.add_word("<mine>", like="dog")
    with pytest.raises(ModelError, match="'seven' was not added; there are: none"):
        model.captions.save_word("seven", tmp_path / "w")
    (tmp_path / "w").write_text("no")
    with pytest.raises(ModelError, match="cannot be read"):
        model.captions.load_words(tmp_path / "w")
    other = D.Captions(D_WORDS, 8)
    other.add_word("<mine>", like="a")
    other.save_word("<mine>", tmp_path / "w")
    with pytest.raises(ModelError, match="'<mine>' has 8 numbers, expected 128"):
        model.captions.load_words(tmp_path / "w")
    with pytest.raises(ModelError, match="begins with <pad> and <start>"):
        D.Captions(["a", "b"], 8)


D_WORDS = (D.PAD, D.START, "a")


# The loss -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_the_loss_is_the_published_one(model: D.Diffusion, kind: str) -> None:
    model.scheduler.register_to_config(prediction_type=kind)
    images, noise, timesteps = given()
    states, _ = model.captions(["seven"] * 4)
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = (1 - beta).cumprod(0)[timesteps].float().view(-1, 1, 1, 1)
    said = model.unet(kept.sqrt() * images + (1 - kept).sqrt() * noise, timesteps, states).sample
    wanted = {"epsilon": noise, "sample": images, "v_prediction": kept.sqrt() * noise - (1 - kept).sqrt() * images}
    loss = model.loss(images, ["seven"] * 4, noise, timesteps)
    assert torch.allclose(loss, (said - wanted[kind]).square().mean(), rtol=1e-4)
    assert torch.equal(loss, model.loss(images, ["seven"] * 4, noise, timesteps))


def test_losses_that_cannot_be_are_refused(model: D.Diffusion) -> None:
    images, noise, timesteps = given()
    with pytest.raises(ModelError, match=r"noise of their shape.*\(3, 1, 8, 8\)"):
        model.loss(images, ["seven"] * 4, noise[:3], timesteps)
    with pytest.raises(ModelError, match=r"n captions, found .*\(2, 2, 128\)"):
        model.loss(images, ["seven"] * 2, noise, timesteps)
    with pytest.raises(ModelError, match=r"timesteps in 0 to 999, found \[1000, 0, 0, 0\]"):
        model.loss(images, ["seven"] * 4, noise, torch.tensor([1000, 0, 0, 0]))
    model.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(ModelError, match="'score', expected one of epsilon, sample, v_prediction"):
        model.loss(images, ["seven"] * 4, noise, timesteps)


def test_timesteps_are_uniform_in_their_window() -> None:
    drawn = torch.cat([D.window_timesteps(10, 0, step) for step in range(4000)])
    assert (int(drawn.min()), int(drawn.max())) == (500, 899)
    counts = torch.bincount((drawn - 500) // 40, minlength=10).float()
    assert float((counts - 4000).square().sum() / 4000) < 27.9  # chi square of 9 degrees of freedom, one in a thousand
    assert torch.equal(D.window_timesteps(5, 1, 2), D.window_timesteps(5, 1, 2))
    assert not torch.equal(D.window_timesteps(5, 1, 2), D.window_timesteps(5, 2, 1))
    assert D.window_timesteps(3, 0, total=100, low=98, margin=1).tolist() == [98, 98, 98]
    for low, margin in ((900, 100), (-1, 100), (500, -1)):
        with pytest.raises(ModelError, match="are no window"):
            D.window_timesteps(1, 0, low=low, margin=margin)


# Sampling -------------------------------------------------------------------------------------------------------------


def test_samples_repeat_and_follow_caption_and_guidance(trained: D.Diffusion) -> None:
    state = torch.get_rng_state()
    one = trained.sample(["seven", "two"], seed=1, steps=5)
    assert one.shape == (2, 1, 8, 8)
    assert one.dtype == torch.float32
    assert float(one.abs().max()) <= 1
    assert torch.equal(one, trained.sample(["seven", "two"], seed=1, steps=5))
    assert not torch.equal(one, trained.sample(["seven", "two"], seed=2, steps=5))
    assert not torch.equal(one[1], trained.sample(["seven", "three"], seed=1, steps=5)[1])
    plain, twice = (trained.sample(["seven"], seed=1, steps=5, guidance=g) for g in (1.0, 1.0 + 1e-6))
    assert torch.allclose(plain, twice, atol=1e-3)
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(ModelError, match="1 to 1000 sampling steps, found 0"):
        trained.sample(["seven"], steps=0)


# Loading --------------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_diffusers_itself(trained: D.Diffusion) -> None:
    from diffusers import DDPMScheduler, UNet2DConditionModel

    read = UNet2DConditionModel.from_pretrained(WEIGHTS / "tiny-unet", torch_dtype=torch.float32)
    assert same(weights(read), weights(trained.unet))
    assert DDPMScheduler.from_pretrained(WEIGHTS / "tiny-unet").config["num_train_timesteps"] == 1000


def test_models_that_cannot_be_loaded_are_refused(tmp_path: Path, model: D.Diffusion) -> None:
    with pytest.raises(ModelError, match=r"no diffusion model 'tiny-unt'\. Did you mean 'tiny-unet'"):
        D.load("tiny-unt")
    with pytest.raises(ModelError, match=r"has no scheduler_config.json.*tunesmith.models.load_model"):
        D.load("tiny-vit")
    model.save_pretrained(tmp_path)
    written = (tmp_path / D.VOCABULARY).read_text()
    (tmp_path / D.VOCABULARY).write_text(json.dumps({"words": []}))
    with pytest.raises(ModelError, match=r"captions\.json and captions\.safetensors cannot be used"):
        D.load(tmp_path)
    (tmp_path / D.VOCABULARY).write_text(written)
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="cannot be loaded as a diffusion model"):
        D.load(tmp_path)


def test_without_diffusers_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModelError, match=r"pip install 'tunesmith\[diffusion\]'"):
        D.load("tiny-unet")


def test_other_loaders_refuse_it() -> None:
    with pytest.raises(ModelError, match="tiny-unet"):
        load_model("tiny-unet")


# Eight bits -----------------------------------------------------------------------------------------------------------


def bytes_of(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def test_eight_bits_are_a_quarter_and_round_to_the_nearest(trained: D.Diffusion) -> None:
    small = D.load("tiny-unet", int8=True)
    assert not [p for p in small.parameters() if p.requires_grad]
    assert bytes_of(small.unet) < 0.28 * bytes_of(trained.unet)
    kinds = {"linear": 0, "conv": 0}
    for name, layer in trained.unet.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            codes = small.unet.get_submodule(name)
            assert isinstance(codes, D.Int8Layer)
            error = (codes.codes.float() * codes.scale - layer.weight.detach()).abs()
            assert bool((error <= 0.5001 * codes.scale).all())
            assert bool((codes.codes.abs().flatten(1).amax(1) == 127).all())
            kinds[kind_of(layer)] += 1
    assert kinds["linear"] > 40
    assert kinds["conv"] > 15
    images, noise, timesteps = given(64)
    losses = [float(m.loss(images, ["seven"] * 64, noise, timesteps).detach()) for m in (trained, small)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_eight_bits_of_any_layer_compute_what_its_rounded_weight_does() -> None:
    layers = nn.ModuleList([nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2, bias=False), nn.Linear(5, 3)])
    inputs = [torch.randn(2, 4, 7, 7), torch.randn(2, 5)]
    for i, (layer, x) in enumerate(zip(list(layers), inputs, strict=True)):
        (codes,) = D.freeze_in_int8(nn.Sequential(layer))
        with torch.no_grad():
            layer.weight.copy_(codes.codes * codes.scale)  # type: ignore[operator]
        assert torch.equal(codes(x), layer(x)), i
    low = D.freeze_in_int8(nn.Sequential(nn.Linear(5, 3).bfloat16()))
    assert low(inputs[1].bfloat16()).dtype == torch.bfloat16


# Adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: tunesmith.adapter("ssf", std=0.0),
        lambda: tunesmith.adapter("lora", target_modules=["conv1", "conv2", "to_q", "to_v"]),
        lambda: peft.LoraConfig(target_modules=["conv1", "conv2", "to_q", "to_v"]),
    ],
    ids=["ssf", "lora", "PEFT's own"],
)
def test_adapters_reach_convolutions_and_train(model: D.Diffusion, make: Callable[[], Any], tmp_path: Path) -> None:
    images, noise, timesteps = given()
    captions = ["seven", "two", "", "a thin one"]
    before = model.loss(images, captions, noise, timesteps).detach()
    adapted = D.Diffusion(peft.get_peft_model(model.unet, make()), model.scheduler, model.captions)
    trains = {name: p for name, p in adapted.unet.named_parameters() if p.requires_grad}
    assert any("conv1" in name for name in trains)
    assert any("to_q" in name for name in trains)
    optimizer = torch.optim.Adam(trains.values(), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted.loss(images, captions, noise, timesteps)
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trains.values())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    after = adapted.loss(images, captions, noise, timesteps).detach()
    assert torch.allclose(losses[0], before, atol=1e-5)
    assert after < before
    adapted.unet.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(unet.build(seed=0).eval().unet, tmp_path)
    again = D.Diffusion(loaded, model.scheduler, model.captions).loss(images, captions, noise, timesteps)
    assert torch.allclose(again, after, atol=1e-6)
    merged = D.Diffusion(adapted.unet.merge_and_unload(), model.scheduler, model.captions)
    assert torch.allclose(merged.loss(images, captions, noise, timesteps), after, atol=1e-4)


# A word of one's own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("int8", [False, True], ids=["float", "int8"])
def test_forward_passes_alone_change_one_row(int8: bool) -> None:
    model = D.load("tiny-unet", int8=int8)
    row = model.captions.add_word("<mine>", like="seven")
    before, images = weights(model), given()[0]
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        asked.append((inputs[0].clone(), inputs[1].clone(), inputs[2].clone()))

    model.unet.register_forward_pre_hook(note)
    with saved_bytes(model) as saved:
        losses = D.invert(model, ZOPersonalization([row]), images, ["<mine>", "a <mine>"], steps=4, batch=2)
    assert saved.bytes == 0
    changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
    assert changed == ["captions.own.0"]
    assert len(losses) == 4
    assert len(asked) == 4 * 3
    for step in range(4):
        noisy, timesteps, states = zip(*asked[3 * step : 3 * step + 3], strict=True)
        assert all(torch.equal(noisy[0], other) for other in noisy)
        assert all(torch.equal(timesteps[0], other) for other in timesteps)
        assert not torch.equal(states[0], states[1])
        assert bool(((timesteps[0] >= 500) & (timesteps[0] < 900)).all())
    assert not torch.equal(asked[0][0], asked[3][0])


def test_a_run_that_goes_on_is_the_same_run(model: D.Diffusion) -> None:
    images, rows = given()[0], []
    for parts in ((6,), (2, 4)):
        fresh = unet.build(seed=0)
        row = fresh.captions.add_word("<mine>", like="seven")
        state, start = None, 0
        for steps in parts:
            optimizer = ZOPersonalization([row])
            if state is not None:
                optimizer.load_state_dict(state)
            D.invert(fresh, optimizer, images, ["<mine>"], steps=steps, start=start, seed=3)
            state, start = optimizer.state_dict(), start + steps
        rows.append(row.detach())
    assert torch.equal(*rows)


def test_a_word_can_be_learnt_by_gradients_too(trained: D.Diffusion) -> None:
    model = D.load("tiny-unet", dtype=torch.bfloat16)
    row = model.captions.add_word("<mine>", like="seven")
    start = row.detach().clone()
    model.unet.requires_grad_(False)
    losses = D.invert(model, torch.optim.Adam([row], lr=1e-2), given()[0], ["<mine>"], steps=3)
    assert len(losses) == 3
    assert row.dtype == torch.float32
    assert not torch.equal(row, start)


def test_runs_that_cannot_be_are_refused(model: D.Diffusion) -> None:
    optimizer = ZOPersonalization([model.captions.add_word("<mine>", like="seven")])
    images = given()[0]
    with pytest.raises(ModelError, match=r"expected images \(n, \*\(1, 8, 8\)\).*found \(4, 3, 8, 8\) and 1"):
        D.invert(model, optimizer, images.repeat(1, 3, 1, 1), ["<mine>"], steps=1)
    with pytest.raises(ModelError, match=r"found \(4, 1, 8, 8\) and 0"):
        D.invert(model, optimizer, images, [], steps=1)
    with pytest.raises(ModelError, match=r"found \(0, 1, 8, 8\) and 1"):
        D.invert(model, optimizer, images[:0], ["<mine>"], steps=1)
    with pytest.raises(ModelError, match="unknown word 'mine'"):
        D.invert(model, optimizer, images, ["mine"], steps=1)
