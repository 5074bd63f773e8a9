"""What is special to Intuitive Fine-Tuning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as T
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import tunesmith
from tests.zoo import VOCABULARY, tiny
from tunesmith import catalog
from tunesmith.core.loss import Labelled
from tunesmith.core.packing import Flatten
from tunesmith.errors import ModelError, RecipeError
from tunesmith.objectives.intuitive_finetuning import IntuitiveFineTuning, discounted
from tunesmith.objectives.sft import SFT

WIDE = {"initializer_range": 0.3}


def equal_lengths(rows: int = 3, prompt: int = 3, answer: int = 5) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, prompt + answer), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def tokens(lengths: list[int], columns: list[int] | None = None) -> tuple[Tensor, Labelled]:
    """Losses of some sequences, and where they stand."""
    segment = torch.tensor([s for s, n in enumerate(lengths) for _ in range(n)]) * 3  # numbers need not be consecutive
    column = torch.tensor([4 + t for n in lengths for t in range(n)] if columns is None else columns)
    losses = torch.rand(len(segment), dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + 0.1
    index = torch.stack([segment, column], dim=1)
    return losses.requires_grad_(), Labelled(torch.empty(0), torch.empty(0), segment, index)


def by_loop(losses: list[float], at: list[int], gamma: float, kind: str, side: str, norm: str) -> list[float]:
    """The weights of one sequence, as the paper and the released code define them."""
    n = len(losses)
    item = {"loss": [x / n for x in losses], "logps": losses, "mask": [1.0] * n}[kind]
    if side == "left":
        u = [sum(gamma ** (at[k] - at[t]) * item[k] for k in range(t, n)) for t in range(n)]
        shape = {"L1": lambda x: x, "L2": lambda x: x * x, "softmax": math.exp, "log": lambda x: math.log(1 + x)}
    else:
        u = [sum(gamma ** (at[t] - at[k]) * item[k] for k in range(t + 1)) for t in range(n)]
        u = [x + min(u) for x in u]
        shape = {
            "L1": lambda x: 1 / x,
            "L2": lambda x: 1 / x**2,
            "softmax": lambda x: math.exp(1 / x),
            "log": lambda x: 1 / math.log(1 + x),
        }
    raw = [shape[norm](x) for x in u]
    return [n * x / sum(raw) for x in raw]


@pytest.mark.parametrize("norm", ["L1", "L2", "softmax", "log"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["loss", "logps", "mask"])
@pytest.mark.parametrize("gamma", [0.5, 0.95, 1.0])
def test_weights_are_the_formulas(gamma: float, kind: Any, side: Any, norm: Any) -> None:
    lengths, columns = [4, 1, 3], [2, 3, 7, 8, 5, 1, 2, 9]
    losses, found = tokens(lengths, columns)
    weights, n = IntuitiveFineTuning(gamma=gamma, kind=kind, side=side, norm=norm).weights(losses, found)
    start = 0
    for length in lengths:
        stop = start + length
        expected = by_loop(losses[start:stop].tolist(), columns[start:stop], gamma, kind, side, norm)
        assert torch.allclose(weights[start:stop], torch.tensor(expected, dtype=torch.float64), rtol=1e-9)
        assert n[start:stop].tolist() == [length] * length
        start = stop


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    gamma=st.floats(0.01, 1.0),
    side=st.sampled_from(["left", "right"]),
    norm=st.sampled_from(["L1", "L2", "softmax", "log"]),
)
@settings(max_examples=50, deadline=None)
def test_weights_have_mean_one_and_are_positive(lengths: list[int], gamma: float, side: Any, norm: Any) -> None:
    losses, found = tokens(lengths)
    weights, _ = IntuitiveFineTuning(gamma=gamma, side=side, norm=norm).weights(losses, found)
    for s in range(len(lengths)):
        assert math.isclose(float(weights[found.segment == 3 * s].mean().detach()), 1.0, abs_tol=1e-9)
    assert bool((weights > 0).all())


@given(n=st.integers(1, 40), gamma=st.floats(0, 1))
@settings(max_examples=40, deadline=None)
def test_discounted_sums(n: int, gamma: float) -> None:
    x = torch.randn(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    expected, rest = torch.zeros_like(x), torch.zeros(2, dtype=torch.float64)
    for t in reversed(range(n)):
        rest = x[:, t] + gamma * rest
        expected[:, t] = rest
    assert torch.allclose(discounted(x, gamma), expected, atol=1e-12)


def test_perfect_answers_have_no_loss_and_finite_gradients() -> None:
    _, found = tokens([3, 2])
    for side in ("left", "right"):
        losses = torch.zeros(5, requires_grad=True)
        weights, n = IntuitiveFineTuning(side=side).weights(losses, found)
        (weights * losses / n).sum().backward()
        assert bool(losses.grad.isfinite().all())


def test_without_blend_and_discount_it_is_sft() -> None:
    model, batch = tiny("llama", **WIDE), equal_lengths()
    ours, theirs = IntuitiveFineTuning(lam=0.0, gamma=0.0)(model, batch)[0], SFT()(model, batch)[0]
    assert torch.allclose(ours, theirs, atol=1e-6)
    mine, other = (torch.autograd.grad(loss, list(model.parameters())) for loss in (ours, theirs))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine, other, strict=True))


def test_the_weights_carry_gradient_unless_detached() -> None:
    model, batch = tiny("llama", **WIDE), equal_lengths()
    losses, grads = [], []
    for detach in (False, True):
        loss, _ = IntuitiveFineTuning(lam=0.0, detach_weights=detach)(model, batch)
        losses.append(loss)
        grads.append(torch.autograd.grad(loss, model.lm_head.weight)[0])
    assert torch.equal(*losses)
    assert not torch.allclose(*grads, atol=1e-4)


def test_only_the_response_is_guessed_and_a_row_keeps_its_first_token() -> None:
    model = tiny("llama", **WIDE)
    seen: list[Tensor] = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    whole = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9, 4, 3], "labels": [-100, -100, 4, 3]}]
    batch = {**Flatten()(whole)}
    batch["labels"][0, 0], batch["labels"][0, 3] = 5, 8  # labels that nothing predicts
    tunesmith.core.packing.enable(model)
    seen.clear()
    IntuitiveFineTuning(lam=0.5)(model, batch)
    handle.remove()
    first, second = seen
    assert torch.equal(first, batch["input_ids"])
    gold, guessed = second.chunk(2)
    assert torch.equal(gold, batch["input_ids"])
    free = torch.tensor([False, True, True, False, False, True, True])
    assert torch.equal(guessed[0][~free], gold[0][~free])
    with torch.no_grad():
        for start, stop in ((0, 3), (3, 7)):
            logits = model(input_ids=batch["input_ids"][:, start:stop]).logits[0]
            for t in range(start + 1, stop):
                if free[t]:
                    assert int(guessed[0, t]) == int(logits[t - start - 1].argmax())
    assert not torch.equal(guessed, gold)


def test_a_scaled_embedding_is_scaled_once() -> None:
    """Gemma's embedding multiplies by sqrt(dim); with full weight on the guesses, they are as if they were given."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = T.Gemma2ForCausalLM(T.Gemma2Config(**size, **heads, pad_token_id=0)).eval()
    batch = equal_lengths()
    logits = model(input_ids=batch["input_ids"]).logits
    guessed = batch["input_ids"].clone()
    guessed[:, 3:] = logits[:, 2:-1].argmax(-1)
    expected = SFT()(model, {**batch, "input_ids": guessed})[0]
    assert torch.allclose(IntuitiveFineTuning(lam=1.0, gamma=0.0)(model, batch)[0], expected, atol=1e-6)


def test_guesses_with_and_without_dropout() -> None:
    model, batch = tiny("gpt2", resid_pdrop=0.4, **WIDE).train(), equal_lengths()
    model.transformer.h[1].eval()
    modes: list[list[bool]] = []
    model.transformer.h[0].register_forward_pre_hook(lambda m, args: modes.append([m.training, model.lm_head.training]))
    for mode, expected in (("train", [True, True]), ("eval", [False, False])):
        modes.clear()
        IntuitiveFineTuning(guess_mode=mode)(model, batch)
        assert modes == [expected, [True, True]]
        assert not model.transformer.h[1].training, "each module goes back to the mode that it had"


def test_beside_a_prompt_and_an_adapter() -> None:
    batch = equal_lengths()
    both = tunesmith.stack(
        tunesmith.adapter("dylora", rank=2, target_modules=["embed_tokens", "q_proj"]),
        tunesmith.adapter("dept", num_virtual_tokens=3, rank=2),
    )
    model = get_peft_model(tiny("llama", **WIDE), both).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
        logits = model(input_ids=batch["input_ids"]).logits
        guessed = batch["input_ids"].clone()
        guessed[:, 3:] = logits[:, 2:-1].argmax(-1)
        expected = SFT()(model, {**batch, "input_ids": guessed})[0]
    loss, scalars = IntuitiveFineTuning(lam=1.0, gamma=0.0)(model, batch)
    assert torch.allclose(loss, expected, atol=1e-6)
    share = (guessed == batch["input_ids"])[:, 3:].float().mean()
    assert torch.allclose(scalars["guessed"], share)


def test_a_model_that_embeds_otherwise_is_refused_and_hooks_go() -> None:
    model, batch = tiny("llama", **WIDE), equal_lengths()
    other = nn.Embedding(4, 4)
    model.get_input_embeddings = lambda: other
    with pytest.raises(ModelError, match="does not embed its input ids"):
        IntuitiveFineTuning()(model, batch)
    assert not other._forward_hooks
    assert not other._forward_pre_hooks


@pytest.mark.parametrize("option", [{"lam": 1.1}, {"gamma": -0.1}, {"side": "up"}, {"norm": "L3"}, {"kind": "x"}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(option))):
        catalog.get("intuitive-finetuning").validate(option)


@pytest.mark.distributed
def test_under_data_parallel(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain, wrapped, batch = tiny("llama", **WIDE), tiny("llama", **WIDE), equal_lengths()
        parallel = DistributedDataParallel(wrapped)
        for _ in range(2):
            for model in (plain, parallel):
                IntuitiveFineTuning()(model, batch)[0].backward()
        for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
            assert torch.allclose(a.grad, b.grad, atol=1e-6)
    finally:
        dist.destroy_process_group()
