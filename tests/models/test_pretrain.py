"""How the embedded models are made: what they see, packing that does not leak, and runs that continue."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tunesmith import world
from tunesmith.errors import CheckpointError
from tunesmith.models import diffusion
from tunesmith.models.pretrain import encoder, lm, loop, mixture, unet
from tunesmith.models.pretrain.__main__ import main
from tunesmith.models.pretrain.tokenizer import load
from tunesmith.world import realtext
from tunesmith.world.images import digits


@pytest.fixture(scope="module")
def mix() -> mixture.Mixture:
    return mixture.Mixture(load(), seed=3)


def documents(mix: mixture.Mixture, steps: int) -> list[str]:
    found = []
    for step in range(steps):
        packed = mix.packed(step, 4, 256)
        for ids, segment in zip(packed.ids, packed.segment, strict=True):
            found += [mix.tokenizer.decode(ids[segment == n]) for n in range(1, int(segment.max()) + 1)]
    return found


def test_mixture_is_the_pretraining_families_exactly(mix: mixture.Mixture) -> None:
    assert set(mix.families) == set(mixture.WEIGHTS) == set(world.families(pretraining=True))
    assert not set(mix.families) & set(world.families(pretraining=False))


def test_a_kept_family_in_the_mixture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world.Boxes, "pretraining", True)
    with pytest.raises(AssertionError, match="pretraining families exactly"):
        mixture.Mixture(load(), seed=0)


def test_no_heldout_prompt_is_shown(mix: mixture.Mixture) -> None:
    shown = "\n".join(documents(mix, 25)) + "\n"
    heldout = [item for name in mix.families for item in world.get(name).items(250, split="heldout")]
    leaked = [i for i in heldout if f"{i.prompt}{i.answer}" in shown or f">{i.prompt.rstrip()}<" in shown]
    assert leaked == []
    train = [item for item in world.get("facts").every_item() or () if item.prompt in shown]
    assert len(train) > 50


def test_both_forms_and_all_families_occur(mix: mixture.Mixture) -> None:
    found = documents(mix, 10)
    chat = [d for d in found if "<|user|>" in d]
    assert 0.35 < len(chat) / len(found) < 0.65
    assert any(d.startswith("<|system|>") for d in chat)
    assert any(d.count("<|user|>") > 1 for d in chat)
    assert all(d.endswith("<|eos|>") for d in found)
    for start in ("Copy:", "Reverse:", "Sort:", "Add:", "Is this review", "Velic to Orsan:", "Orsan to Velic:"):
        assert any(d.removeprefix("<|bos|>").startswith(start) for d in found)
        assert any(f"<|user|>{start}" in d for d in found)


def test_chat_documents_follow_the_template(mix: mixture.Mixture) -> None:
    found = [d for d in documents(mix, 5) if d.startswith("<|user|>") and d.count("<|user|>") == 1]
    for document in found:
        user, assistant = document.removesuffix("<|eos|>").removeprefix("<|user|>").split("<|assistant|>")
        assert user == user.rstrip()
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        assert mix.tokenizer.apply_chat_template(turns, tokenize=False) == document


def test_answers_carry_the_loss(mix: mixture.Mixture) -> None:
    packed = mix.packed(0, 4, 256)
    for row in range(4):
        for n in range(1, int(packed.segment[row].max()) + 1):
            ids, weight = packed.ids[row][packed.segment[row] == n], packed.weight[row][packed.segment[row] == n]
            text = mix.tokenizer.decode(ids)
            assert weight[0] == 0
            if "\n" in text and "<|user|>" not in text:
                answer = text.partition("\n")[2]
                assert mix.tokenizer.decode(ids[weight == 1]) == answer
                assert (weight[1:] > 0).all()


def test_batches_depend_on_seed_and_step_alone(mix: mixture.Mixture) -> None:
    other = mixture.Mixture(load(), seed=3)
    other.packed(1, 2, 128)
    assert torch.equal(mix.packed(7, 2, 128).ids, other.packed(7, 2, 128).ids)
    assert torch.equal(mix.text(7, 1, 64), other.text(7, 1, 64))
    assert not torch.equal(mix.packed(8, 2, 128).ids, mix.packed(7, 2, 128).ids)
    assert not torch.equal(mixture.Mixture(load(), seed=4).packed(7, 2, 128).ids, mix.packed(7, 2, 128).ids)


def test_packed_documents_do_not_see_each_other(mix: mixture.Mixture) -> None:
    model = lm.build("tiny-lm-s", mix.tokenizer, seed=0)
    packed = mix.packed(0, 1, 128)
    together = model(packed.ids, attention_mask=packed.mask(), position_ids=packed.position).logits[0]
    for n in range(1, int(packed.segment.max()) + 1):
        here = packed.segment[0] == n
        alone = model(packed.ids[0, here][None]).logits[0]
        torch.testing.assert_close(together[here], alone, atol=1e-4, rtol=1e-4)


def test_item_loss_is_the_weighted_loss_of_each_document_alone(mix: mixture.Mixture) -> None:
    model = lm.build("tiny-lm-s", mix.tokenizer, seed=0)
    packed = mix.packed(0, 2, 128)
    total, weight = lm.item_loss(model, packed)
    expected = 0.0
    for row in range(2):
        for n in range(1, int(packed.segment[row].max()) + 1):
            here = packed.segment[row] == n
            ids, w = packed.ids[row][here], packed.weight[row][here]
            logp = model(ids[None]).logits[0].detach().double().log_softmax(-1)
            expected -= float((logp[:-1].gather(1, ids[1:, None])[:, 0] * w[1:]).sum())
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert weight.item() == pytest.approx(packed.weight.sum().item(), rel=1e-6)


def test_library_text_is_from_the_pretraining_modules_only(mix: mixture.Mixture) -> None:
    ids = mixture.library(mix.tokenizer, "heldout")
    pieces = list(realtext.text_stream("heldout"))
    assert (ids == mix.tokenizer.eos_token_id).sum() == len(pieces)
    assert mix.tokenizer.decode(ids[: int((ids == mix.tokenizer.eos_token_id).nonzero()[0])]) == pieces[0]


def test_corruption_is_that_of_bert(mix: mixture.Mixture) -> None:
    tokenizer = mix.tokenizer
    ids = torch.full((400, 250), 77)
    ids[:, 200:] = tokenizer.pad_token_id
    corrupted, chosen = encoder.corrupt(ids, tokenizer, torch.Generator().manual_seed(0))
    assert not chosen[:, 200:].any()
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    assert chosen[:, :200].float().mean().item() == pytest.approx(encoder.MASKED, abs=0.015)
    fate = corrupted[chosen]
    assert (fate == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (fate == 77).float().mean().item() == pytest.approx(0.1, abs=0.02)


def test_captions_of_digits_are_true_and_some_are_empty() -> None:
    images, labels = digits("train")
    styles, rng = unet.styles(images, labels), random.Random(0)
    ink = images.reshape(len(images), -1).mean(1)
    for digit in range(10):
        thin, thick = (ink[[i for i in range(len(ink)) if labels[i] == digit and styles[i] == s]] for s in unet.STYLES)
        assert thin.max() < thick.min()
        assert 0.25 < len(thin) / (labels == digit).sum() < 0.42
    said = [unet.caption(int(labels[i]), styles[i], rng).split() for i in range(len(images)) for _ in range(3)]
    assert sum(not words for words in said) / len(said) == pytest.approx(unet.CAPTIONLESS, abs=0.02)
    for i, words in enumerate(said):
        assert set(words) <= set(unet.WORDS[2:])
        if words:
            assert words[-1] == unet.DIGITS[labels[i // 3]]
            assert {*words} & {*unet.STYLES} <= {styles[i // 3]}
    assert {word for words in said for word in words} == set(unet.WORDS[2:])


class _Regression:
    """A seeded linear problem that stops at a chosen step, as a killed process would."""

    plan = loop.Plan("regression", steps=30, lr=0.05, seed=1, batch={"rows": 8}, warmup=3)

    def __init__(self, stop: int | None = None) -> None:
        self.model = loop.seeded(lambda: nn.Linear(4, 2), seed=1)
        self.stop = stop

    def loss(self, step: int) -> tuple[torch.Tensor, int]:
        if step == self.stop:
            raise KeyboardInterrupt
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        return (self.model(x).float() - x[:, :2]).square().mean(), 8

    def run(self, folder: Path, resume: bool = True) -> loop.Spent:
        return loop.train(self.model, self.plan, self.loss, checkpoints=folder, resume=resume)


def test_a_stopped_run_continues_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    whole, stopped, again = _Regression(), _Regression(stop=13), _Regression()
    whole.run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        stopped.run(tmp_path / "stopped")
    spent = again.run(tmp_path / "stopped")
    assert (spent.step, spent.tokens) == (30, 240)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_learning_rate_warms_up_falls_and_ends_at_zero() -> None:
    plan = loop.Plan("p", steps=100, lr=2.0, seed=0, batch={}, warmup=10)
    assert [plan.rate(step) for step in (0, 5, 10, 55, 100)] == pytest.approx([0.0, 1.0, 2.0, 1.0, 0.0])
    cut = replace(plan, steps=60, horizon=100, cooldown=20)
    assert [cut.rate(step) for step in range(41)] == [plan.rate(step) for step in range(41)]
    assert cut.rate(55) == pytest.approx(0.25 * plan.rate(55))
    assert cut.rate(60) == 0.0


def test_without_resume_a_run_begins_again(tmp_path: Path) -> None:
    _Regression().run(tmp_path)
    fresh = _Regression()
    assert fresh.run(tmp_path, resume=False).tokens == 240
    with pytest.raises(KeyboardInterrupt):
        _Regression(stop=0).run(tmp_path, resume=False)


def test_a_checkpoint_of_another_plan_is_refused(tmp_path: Path) -> None:
    _Regression().run(tmp_path)
    other = _Regression()
    other.plan = replace(other.plan, lr=0.1)
    with pytest.raises(CheckpointError, match=r"another plan \(lr: 0\.05 then, 0\.1 now\)"):
        other.run(tmp_path)


def test_training_learns_and_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    problem = _Regression()
    before = problem.loss(999)[0].item()
    problem.run(tmp_path)
    assert problem.loss(999)[0].item() < 0.5 * before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_command_line_makes_a_diffusion_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "EACH", 1)
    monkeypatch.setattr(unet, "SAMPLING", 2)
    options = ["tiny-unet", "--steps", "2", "--output", str(tmp_path / "unet"), "--checkpoints", str(tmp_path / "run")]
    assert main(options) == 0
    loaded = diffusion.load(tmp_path / "unet")
    assert loaded.dtype == torch.float32
    assert loaded.sample(["a thick seven"], steps=2).shape == (1, 1, 8, 8)
    card = (tmp_path / "unet" / "README.md").read_text()
    assert "library_name: diffusers" in card
    assert "| steps | 2 |" in card
    assert all(file.stat().st_mode & 0o777 == 0o644 for file in (tmp_path / "unet").iterdir())


def test_command_line_makes_a_model_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForImageClassification

    options = ["tiny-vit", "--steps", "3", "--output", str(tmp_path / "vit"), "--checkpoints", str(tmp_path / "run")]
    assert main(options) == 0
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "vit").dtype == torch.bfloat16
    assert "| steps | 3 |" in (tmp_path / "vit" / "README.md").read_text()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run", "vit"]
    assert main([*options[:2], "4", *options[3:], "--resume"]) == 2
    assert "leave out --resume" in capsys.readouterr().err
