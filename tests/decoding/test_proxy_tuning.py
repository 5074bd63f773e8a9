"""Proxy-tuning: the formula itself, its options, and where it stands among generate's other processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor

from tests.speech import EOS, PAD, lively, prompts, tokenizer
from tunesmith import catalog
from tunesmith.core.decoding import Helper, Step, build
from tunesmith.core.sidemodel import SideModel, reworded
from tunesmith.decoding.proxy_tuning import ProxyTuning
from tunesmith.errors import RecipeError

LARGE, EXPERT, ANTI = lively("gpt2"), lively("llama", seed=1), lively("llama", seed=2)


def sides(expert: Any = EXPERT, anti: Any = ANTI) -> dict[str, SideModel]:
    return {"expert": SideModel(expert, pad_token_id=PAD), "anti_expert": SideModel(anti, pad_token_id=PAD)}


def generate(model: Any, method: ProxyTuning | None = None, **style: Any) -> Tensor:
    ids, mask = prompts()
    torch.manual_seed(3)
    processors = None if method is None else [method]
    size = {"max_new_tokens": 12, **style}
    return model.generate(input_ids=ids, attention_mask=mask, logits_processor=processors, **size)


def step(scores: Tensor, expert: Tensor, anti: Tensor) -> Step:
    ids = torch.zeros(len(scores), 1, dtype=torch.long)
    return Step(ids=ids, prompt_length=1, scores=scores, logits={"expert": expert, "anti_expert": anti})


@given(st.integers(0, 1000), st.floats(-3, 3), st.one_of(st.none(), st.integers(1, 12)))
def test_the_law_is_the_formula(seed: int, alpha: float, top_k: int | None) -> None:
    g = torch.Generator().manual_seed(seed)
    M, E, A = (4 * torch.randn(3, 9, generator=g) for _ in range(3))
    method = ProxyTuning(sides(), alpha=alpha, top_k=top_k)
    found = method.combine(step(M, E, A)).softmax(1)
    raw = M.double() + alpha * (E.double() - A.double())
    if top_k is not None and top_k < 9:
        floor = M.sort(1, descending=True).values[:, top_k - 1 : top_k]
        raw = raw.masked_fill(floor > M, -torch.inf)
    assert torch.allclose(found.double(), raw.softmax(1), atol=1e-5)
    # Log-probabilities in place of logits: the same law.
    normalised = method.combine(step(M.log_softmax(1), E.log_softmax(1), A.log_softmax(1))).softmax(1)
    assert torch.allclose(normalised, found, atol=1e-5)


@pytest.mark.parametrize("style", [{}, {"do_sample": True}, {"do_sample": True, "temperature": 0.6, "top_p": 0.8}])
def test_the_three_identities(style: dict[str, Any]) -> None:
    plain = generate(LARGE, **style)
    assert torch.equal(generate(LARGE, ProxyTuning(sides(), alpha=0.0), **style), plain)
    assert torch.equal(generate(LARGE, ProxyTuning(sides(ANTI, ANTI)), **style), plain)
    assert torch.equal(generate(LARGE, ProxyTuning(sides(EXPERT, LARGE)), **style), generate(EXPERT, **style))


def test_top_k_never_leaves_the_large_models_favourites() -> None:
    kept = {"output_logits": True, "return_dict_in_generate": True, "do_sample": True, "min_new_tokens": 12}
    out = generate(LARGE, ProxyTuning(sides(), top_k=3, alpha=2.0), **kept)
    allowed = torch.stack(out.logits, dim=1)
    allowed[..., EOS] = -torch.inf
    chosen = out.sequences[:, 7:, None]
    assert bool((allowed.topk(3).indices == chosen).any(-1).all())
    firsts = allowed.topk(1).indices
    assert not torch.equal(firsts, chosen), "the choice among them is the combination's"
    alone = generate(LARGE, ProxyTuning(sides(), top_k=1, alpha=2.0))
    assert torch.equal(alone, generate(LARGE))


def test_one_set_of_weights_gives_both_small_models() -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    small = get_peft_model(lively("llama", seed=2), config).eval()
    words = tokenizer()
    both = {"expert": Helper(small, words), "anti_expert": Helper(small, words, adapter=False)}
    found = generate(LARGE, build("proxy-tuning", LARGE, words, both, alpha=2.0)[0])
    merged = get_peft_model(lively("llama", seed=2), config).eval()
    merged.load_state_dict(small.state_dict())
    apart = {"expert": (merged.merge_and_unload(), words), "anti_expert": (ANTI, words)}
    expected = generate(LARGE, build("proxy-tuning", LARGE, words, apart, alpha=2.0)[0])
    assert torch.equal(found, expected)
    assert not torch.equal(found, generate(LARGE))


def test_the_expert_may_read_a_template_of_its_own() -> None:
    words = tokenizer()
    chat = reworded(words, lambda text: f"w5 w6 {text} w7")
    helpers = {"expert": Helper(LARGE, words, retarget=chat), "anti_expert": Helper(ANTI, words)}
    method = build("proxy-tuning", LARGE, words, helpers)[0]
    ids, mask = prompts()
    with torch.no_grad():
        scores = LARGE(input_ids=ids[:1]).logits[:, -1]
        said = torch.cat([torch.tensor([[5, 6]]), ids[:1], torch.tensor([[7]])], dim=1)
        expected = scores + LARGE(input_ids=said).logits[:, -1] - ANTI(input_ids=ids[:1]).logits[:, -1]
    assert torch.allclose(method(ids[:1], scores).softmax(1), expected.softmax(1), atol=1e-4)
    assert generate(LARGE, method).shape[0] == len(mask)


@pytest.mark.parametrize(
    ("options", "found"), [({"alpha": "nan"}, "alpha"), ({"top_k": 0}, "top_k"), ({"k": 5}, "no option 'k'")]
)
def test_options_are_checked(options: dict[str, Any], found: str) -> None:
    with pytest.raises(RecipeError, match=found):
        catalog.get("proxy-tuning").validate(options)


def test_counts_are_one_token_a_step() -> None:
    method = ProxyTuning(sides())
    generate(LARGE, method, min_new_tokens=12)
    _, mask = prompts()
    for side in method.helpers.values():
        assert side.forwards == 12
        assert side.tokens == int(mask.sum()) + 11 * 3
