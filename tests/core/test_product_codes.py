"""Attention over keys chosen by product codes: by loops, against dense attention, its gradients and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.core import meters, product_codes
from tunesmith.core.product_codes import Codebook, Selection, Sight, attend, codebook_loss, kept_keys, update

B, H, GROUPS, N, DIM = 2, 4, 2, 11, 12
CPU = torch.device("cpu")


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def heads(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as attention layers give them, tokens before heads."""
    shapes = ((B, N, H, DIM), (B, N, GROUPS, DIM), (B, N, GROUPS, 5))
    q, k, v = (numbers(*shape, seed=i, dtype=dtype).transpose(1, 2) for i, shape in enumerate(shapes))
    return q, k, v


def book(size: int = 4, count: int = 6) -> Codebook:
    return Codebook(DIM, size, count, "layer", CPU)


def masks() -> dict[str, Any]:
    """(mask as transformers gives it, causal, who sees whom)."""
    lower = torch.ones(N, N, dtype=torch.bool).tril().expand(B, 1, N, N)
    padded = lower.clone()
    padded[1, :, :, 8:] = False
    left = lower.clone()
    left[1, :, :, :4] = False
    added = torch.zeros(left.shape).masked_fill(~left, torch.finfo(torch.float32).min)
    everyone = torch.ones_like(lower)
    return {
        "causal": (None, True, lower),
        "everyone": (None, False, everyone),
        "padded": (padded, False, padded),
        "left padded": (left, False, left),
        "added": (added, False, left),
    }


def test_a_code_is_the_nearest_codeword_of_its_part() -> None:
    made, z = book(), numbers(3, 5, DIM)
    codes = made.encode(z)
    assert codes.shape == (3, 3, 5)
    for part in range(3):
        for i in range(3):
            for j in range(5):
                piece = z[i, j, 4 * part : 4 * part + 4]
                far = [float((piece - word).abs().sum()) for word in made.words[part]]
                assert int(codes[part, i, j]) == far.index(min(far))


def test_the_loss_is_its_formula() -> None:
    words, z, weight = numbers(3, 6, 4, seed=1), numbers(5, DIM), torch.tensor([1.0, 0, 1, 1, 0])
    off = torch.zeros(5)
    for i in range(5):
        for part in range(3):
            piece = z[i, 4 * part : 4 * part + 4]
            inverse = torch.stack([1 / (piece - word).abs().sum() for word in words[part]])
            hard = words[part][inverse.argmax()]
            soft = (inverse / inverse.sum()) @ words[part]
            off[i] += ((soft - hard).square() + (piece - hard).square()).mean() / 3
    assert torch.allclose(codebook_loss(z, words), off.mean(), atol=1e-6)
    assert torch.allclose(codebook_loss(z, words, weight), (off * weight).sum() / 3, atol=1e-6)


@pytest.mark.parametrize("kind", masks())
@pytest.mark.parametrize(("keys", "latest"), [(0.25, False), (0.25, True), (3, False), (1.0, False), (99, False)])
def test_the_keys_with_most_equal_codes(kind: str, keys: float, latest: bool) -> None:
    """Among what a query sees, ties in order; a share is of the row's own tokens."""
    query, key, _ = heads()
    mask, causal, seen = masks()[kind]
    made = book()
    index = kept_keys(query, key, Sight(N, N, mask, causal), Selection(made, keys, latest))
    mine, theirs = made.encode(query), made.encode(key)
    for b in range(B):
        own = int(seen[b, 0].any(0).sum())
        most = -(-own // 4) if keys == 0.25 else own if keys == 1 else int(keys)
        for h in range(H):
            for i in range(N):
                there = [j for j in range(N) if seen[b, 0, i, j]]
                equal = {j: int((mine[:, b, h, i] == theirs[:, b, h // 2, j]).sum()) for j in there}
                best = sorted(there, key=lambda j, equal=equal: (-equal[j], -j if latest else j))[:most]
                found = index[b, h, i].tolist()
                assert found[: len(best)] == best
                assert set(found[len(best) :]) <= {-1}


@pytest.mark.parametrize("kind", masks())
def test_with_all_keys_it_is_dense_attention(kind: str) -> None:
    query, key, value = heads()
    mask, causal, seen = masks()[kind]
    index = kept_keys(query, key, Sight(N, N, mask, causal), Selection(book(), 1.0))
    bias = numbers(1, H, N, N, seed=7)
    found = attend(query, key, value, index, 0.3, bias)
    k, v = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = (query @ k.transpose(2, 3) * 0.3 + bias).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ v
    assert torch.allclose(found, expected, atol=1e-6)


def test_gradients_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, with dropout drawn again alike; in strips of two queries the same."""
    query, key, value = (t[:1, :, :4].requires_grad_() for t in heads(torch.float64))
    sight = Sight(4, 4, None, True)
    bias = numbers(1, H, 4, 4, seed=7, dtype=torch.float64).requires_grad_()
    index = kept_keys(query, key, sight, Selection(book(), 2))
    for dropout in (0.0, 0.4):

        def run(*given: Tensor, dropout: float = dropout) -> Tensor:
            torch.manual_seed(0)
            return attend(*given[:3], index, 0.3, given[3], dropout)

        assert torch.autograd.gradcheck(run, (query, key, value, bias), fast_mode=True)
    whole = torch.autograd.grad(run(query, key, value, bias).square().sum(), (query, key, value, bias))
    monkeypatch.setattr(product_codes, "_ROOM", 2 * H * 2 * DIM)
    assert torch.equal(kept_keys(query, key, sight, Selection(book(), 2)), index)
    for a, b in zip(
        whole, torch.autograd.grad(run(query, key, value, bias).square().sum(), (query, key, value, bias)), strict=True
    ):
        assert torch.allclose(a, b)


def test_dropout_keeps_the_mean() -> None:
    value = torch.ones(1, 1, 400, 1)
    zeros = torch.zeros(1, 1, 400, 4)
    index = torch.arange(400, dtype=torch.int16).expand(1, 1, 400, 400)
    torch.manual_seed(0)
    out = attend(zeros, zeros, value, index, 1.0, None, 0.25)
    assert float(out.mean()) == pytest.approx(1, abs=0.01)
    assert float(out.std()) == pytest.approx((1 / 0.75 - 1) ** 0.5 / 20, rel=0.2)


def test_what_is_kept_for_the_backward_pass() -> None:
    """Queries, keys, values and two bytes for each kept key."""
    query, key, value = (t.requires_grad_() for t in heads())
    index = kept_keys(query, key, Sight(N, N, None, True), Selection(book(), 0.25))
    with meters.saved_bytes() as saved:
        attend(query, key, value, index, 0.3)
    assert saved.bytes == query.nbytes + key.nbytes + value.nbytes + B * H * N * 3 * 2


def test_learning_moves_the_codewords_alone_and_lowers_the_loss() -> None:
    query, key, _ = (t.requires_grad_() for t in heads())
    made = book()
    first = None
    for step in range(60):
        made.learn(query, key, None, step)
        first = float(made.loss) if first is None else first
        update([made], 2e-2)
    assert float(made.loss) < 0.7 * first
    assert query.grad is None
    words = made.words.clone()
    update([made], 2e-2)
    assert torch.equal(made.words, words), "nothing was learnt in between"


def test_a_step_is_adams_on_the_mean_over_all_tokens() -> None:
    """Micro-batches with other padding, against torch's Adam on one batch; two steps."""
    query, key, _ = heads()
    valid = torch.ones(B, N, dtype=torch.bool)
    valid[1, 6:] = False
    made, words = book(), book().words.requires_grad_()
    adam = torch.optim.Adam([words], lr=2e-2)
    for _ in range(2):
        for row in range(B):
            made.learn(query[row : row + 1], key[row : row + 1], valid[row : row + 1], 0)
        update([made], 2e-2)
        real = [z.transpose(1, 2)[valid].flatten(0, 1) for z in (query, key)]
        adam.zero_grad()
        sum(codebook_loss(z, words) for z in real).backward()
        adam.step()
    assert torch.allclose(made.words, words.detach(), atol=1e-6)


def test_processes_learn_from_the_tokens_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = heads()
    one, other, both = book(), book(), book()
    one.learn(query[:1], key[:1], None, 0)
    other.learn(query[1:, :, :5], key[1:, :, :5], None, 0)
    both.gradient.copy_(one.gradient + other.gradient)
    both.learnt = one.learnt + other.learnt
    theirs = torch.cat([other.gradient.flatten(), torch.tensor([other.learnt])])
    update([both], 2e-2)
    monkeypatch.setattr(product_codes.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(product_codes.dist, "all_reduce", lambda t: t.add_(theirs))
    update([one], 2e-2)
    assert torch.allclose(one.words, both.words, atol=1e-7)


def test_of_many_vectors_some_are_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, _ = heads()
    monkeypatch.setattr(product_codes, "MOST", 16)
    losses = []
    for step in (0, 0, 1):
        made = book()
        made.learn(query, key, None, step)
        losses.append(float(made.loss))
    assert losses[0] == losses[1] != losses[2]


def test_the_released_layout_is_not_that_of_attention() -> None:
    """Its output, (rows times heads, n, dim), is transposed and viewed as (rows, n, heads, dim): another tensor."""
    query, key, value = (numbers(B, H, N, DIM, seed=i) for i in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    index = kept_keys(query, key, Sight(N, N, None, True), Selection(book(), 1.0))
    found = attend(query, key, value, index, DIM**-0.5)
    assert torch.allclose(found, expected, atol=1e-6)
    released = found.flatten(0, 1).transpose(1, 2).contiguous().view(B, N, H, DIM).transpose(1, 2)
    assert (released - expected).abs().max() > 1


def test_autocast_does_not_reach_the_codewords() -> None:
    query, key, _ = heads()
    made = [book(), book()]
    for on, one in enumerate(made):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(on)):
            one.learn(query, key, None, 0)
            codes = one.encode(query)
        assert torch.equal(codes, made[0].encode(query))
    assert torch.equal(made[0].gradient, made[1].gradient)
    assert attend(*heads(), torch.zeros(B, H, N, 1, dtype=torch.int16), 1.0).dtype == torch.float32
