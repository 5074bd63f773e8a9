"""LeMo: what it measures, what it keeps, that what it drops passes unchanged, and how it is calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from tests.speech import PAD, lively, prompts
from tests.train.conftest import rows, write_rows
from tests.zoo import DECODERS, VOCABULARY
from tunesmith.core import patterns, tokens
from tunesmith.core.inference import BlockCall, attached
from tunesmith.core.part import check_combination
from tunesmith.core.patterns import Held
from tunesmith.core.tokens import Pass, Sighting
from tunesmith.errors import CheckpointError, ModelError, RecipeError
from tunesmith.inference.lemo import FILE, LeMo
from tunesmith.recipe import Recipe
from tunesmith.train import run

ON = pytest.mark.parametrize("family", DECODERS)
BLOCKS = 3


def lemo(**options: Any) -> LeMo:
    return LeMo(**{"block": 2, "scores": "exact", "select": "top-k", **options})


class Forced(LeMo):
    """Keeps given columns, (B, k) or (k,), in the blocks that are named."""

    sets: dict[int, Tensor]

    def columns(self, call: BlockCall, here: Pass) -> Tensor | None:
        return self.sets.get(call.index)


def forced(sets: dict[int, Tensor], **options: Any) -> Forced:
    method = Forced(**options)
    method.sets = sets
    return method


def given(rows: int = 2, length: int = 16, labelled: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens whose last ones are labels."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=g)
    labels = ids.clone()
    labels[:, : length - labelled] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def padded(side: str, seed: int = 0) -> dict[str, Tensor]:
    """Two rows of 16 columns, of which the second has 9 tokens."""
    batch = given(seed=seed)
    gone = torch.zeros(16, dtype=torch.bool)
    gone[9:] = True
    gone = gone.flip(0) if side == "left" else gone
    batch["input_ids"][1, gone] = PAD
    batch["attention_mask"][1, gone] = 0
    batch["labels"][1] = batch["input_ids"][1].masked_fill(gone, -100)
    first = 7 if side == "left" else 0
    batch["labels"][1, first : first + 6] = -100
    return batch


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> bool:
    return a.keys() == b.keys() and all(
        torch.allclose(a[n], b[n], atol=tolerance * float(b[n].abs().max().clamp_min(1e-3))) for n in a
    )


# Scores -----------------------------------------------------------------------------------------------------------


class Watching(LeMo):
    """Keeps everything, and what it saw."""

    def columns(self, call: BlockCall, here: Pass) -> Tensor | None:
        self.lifts = [*getattr(self, "lifts", []), tokens.attention_lift(call, here.real, self.block)]
        return None


@ON
@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_are_the_attention_of_the_model(family: str, side: str) -> None:
    """Against the probabilities that the model gives out, by loops over groups."""
    model, batch = lively(family, blocks=BLOCKS), padded(side)
    method = Watching(block=3, ratio=0.5)
    with method.on(model):
        model(**batch)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        shown = model(**batch, output_attentions=True).attentions
    real = batch["attention_mask"].bool()
    counts = real.cumsum(1)
    for lift, full in zip(method.lifts, shown, strict=True):
        for row in range(2):
            for a in range(6):
                for b in range(6):
                    pairs = [
                        float(full[row, :, i, j].mean() * counts[row, i])
                        for i in range(3 * a, min(3 * a + 3, 16))
                        for j in range(3 * b, min(3 * b + 3, 16))
                        if j <= i and real[row, i] and real[row, j]
                    ]
                    expected = sum(pairs) / max(len(pairs), 1)
                    assert float(lift[row, a, b]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_uniform_attention_scores_one_at_any_length() -> None:
    for length in (5, 32):
        count = torch.tensor([[min(4, length - 4 * b) for b in range(-(-length // 4))]]).float()
        g = count.shape[1]
        assert torch.allclose(tokens.score(torch.ones(1, g, g).tril(), count), torch.ones(1, g))
        assert float(tokens.pairs(count).sum()) == length * (length + 1) / 2
    model = lively("llama", blocks=1)
    nn.init.zeros_(model.model.layers[0].self_attn.q_proj.weight)
    method = Watching(block=4)
    with method.on(model):
        model(**given(length=30))
    assert torch.allclose(method.lifts[0], torch.ones(2, 8, 8).tril(), atol=1e-5)


def test_scores_draw_no_random_numbers_and_leave_no_trace() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(lively("llama", blocks=BLOCKS), config).train()
    batch, before = given(), {m: m.training for m in model.modules()}
    torch.manual_seed(0)
    plain = model(**batch).loss
    torch.manual_seed(0)
    with Watching().on(model):
        again = model(**batch).loss
    assert torch.equal(plain, again)
    assert model.config._attn_implementation == "sdpa"
    assert {m: m.training for m in model.modules()} == before


# What is dropped --------------------------------------------------------------------------------------------------


def by_masks(model: T.LlamaForCausalLM, ids: Tensor, sets: dict[int, Tensor]) -> Tensor:
    """Logits with every block run on all tokens, those that it drops masked as keys and put back as queries."""
    body, (rows, n) = model.model, ids.shape
    hidden = body.embed_tokens(ids)
    positions = torch.arange(n)[None]
    rotary = body.rotary_emb(hidden, positions)
    for index, block in enumerate(body.layers):
        kept = torch.ones(rows, n, dtype=torch.bool)
        if index in sets:
            kept = torch.zeros(rows, n, dtype=torch.bool).scatter(1, sets[index], True)
        allowed = torch.ones(n, n, dtype=torch.bool).tril() & (kept[:, None] | torch.eye(n).bool())
        out = block(hidden, attention_mask=allowed[:, None], position_embeddings=rotary, position_ids=positions)
        hidden = torch.where(kept[..., None], out, hidden)
    return model.lm_head(body.norm(hidden))


SETS = {
    0: torch.tensor([[0, 1, 4, 5, 9, 13, 14, 15], [0, 2, 3, 7, 8, 11, 14, 15]]),
    1: torch.tensor([[0, 3, 15], [1, 8, 15]]),
}


def test_logits_and_gradients_equal_masking_instead_of_dropping() -> None:
    model, batch = lively("llama", blocks=BLOCKS), given()
    wanted = by_masks(model, batch["input_ids"], SETS)
    nn.functional.cross_entropy(wanted[:, -4:-1].flatten(0, 1), batch["labels"][:, -3:].flatten()).backward()
    expected = grads(model)
    for kind in ("sdpa", "eager"):
        model.set_attn_implementation(kind)
        with forced(SETS).on(model):
            out = model(**batch)
            out.loss.backward()
        assert torch.allclose(out.logits, wanted, atol=1e-4 * float(wanted.abs().max()))
        assert close(grads(model), expected, 1e-3)


@ON
def test_a_row_of_a_padded_batch_equals_the_row_alone(family: str) -> None:
    model = lively(family, blocks=BLOCKS)
    for side, first in (("left", 7), ("right", 0)):
        batch = padded(side)
        chosen = torch.tensor([0, 2, 3, 6, 8])
        with forced({1: torch.stack([chosen + first, chosen + first])}).on(model):
            # OPT and GPT-2 number columns unless told; a batch knows where its rows begin.
            positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
            found = model(**batch, position_ids=positions).logits[1, first : first + 9]
        row = {"input_ids": batch["input_ids"][1:, first : first + 9], "labels": batch["labels"][1:, first : first + 9]}
        with forced({1: chosen[None]}).on(model):
            alone = model(**row, position_ids=torch.arange(9)[None]).logits[0]
        assert torch.allclose(found, alone, atol=1e-4 * float(alone.abs().max()))


@ON
def test_what_is_dropped_everywhere_still_passes_with_its_gradient(family: str) -> None:
    """The identity path: with no block run there, the last norm and the head alone decide, and gradient comes back."""
    model, batch = lively(family, blocks=BLOCKS), given()
    labels = batch["input_ids"].clone()
    kept = torch.arange(10, 16)[None].expand(2, -1)
    with forced(dict.fromkeys(range(BLOCKS), kept)).on(model):
        embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        out = model(inputs_embeds=embedded, labels=labels)
        out.loss.backward()
    assert bool((embedded.grad[:, :10].abs().sum(-1) > 0).all())
    if family == "llama":
        expected = model.lm_head(model.model.norm(embedded[:, :10]))
        assert torch.allclose(out.logits[:, :10], expected, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@ON
def test_checkpointing_by_transformers_changes_nothing(family: str, reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        model, method = lively(family, blocks=BLOCKS).train(), lemo(ratio=0.5)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with method.on(model):
            model(**padded("right"), use_cache=False).loss.backward()
        found.append(grads(model))
    assert close(found[1], found[0])


class Again(nn.Module):
    """A block that runs again in the backward pass, its method with it, as torch's own wrappers do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return checkpoint(self.block, *args, use_reentrant=False, **kwargs)


def test_blocks_that_run_again_keep_what_their_own_pass_kept() -> None:
    """Also after another pass has begun; passes too long ago are refused."""
    found = []
    for wrapped in (False, True):
        model, method = lively("llama", blocks=BLOCKS).train(), lemo(ratio=0.5)
        with method.on(model):
            if wrapped:
                model.model.layers = nn.ModuleList(Again(block) for block in model.model.layers)
            sum(model(**padded("right", seed=s), use_cache=False).loss for s in (0, 5)).backward()
            found.append({n.replace(".block", ""): g for n, g in grads(model).items()})
            if wrapped:
                losses = [model(**padded("right", seed=s), use_cache=False).loss for s in range(5)]
                with pytest.raises(ModelError, match="at most 4 passes"):
                    losses[0].backward()
    assert close(found[1], found[0])


def test_rows_keep_a_common_number_with_what_must_stay() -> None:
    scores = torch.tensor([[0.1, 5, 4, 0.2, 3, 0.1], [0.5, 0.4, 0.6, 0.7, 9, 9]])
    held = torch.tensor([[2, 2, 2, 2, 2, 1], [2, 2, 2, 2, 0, 0]]).float()
    must = torch.tensor([[1, 0, 0, 0, 0, 1], [1, 0, 0, 1, 0, 1]]).bool()
    # Row 0 asks for three groups; row 1 for two, and for the last columns, which all rows keep.
    assert tokens.choose(scores, held, must, 0.5, None).tolist() == [[0, 1, 5], [0, 3, 5]]
    assert tokens.choose(scores, held, must, 0.5, torch.tensor(3.5)).tolist() == [[0, 1, 2, 5], [0, 2, 3, 5]]
    assert tokens.choose(scores, held, must, 0.1, torch.tensor(torch.inf)).tolist() == [[0, 1, 5], [0, 3, 5]]
    assert tokens.spread(torch.tensor([[0, 1, 5]]), 2, 11).tolist() == [[0, 1, 2, 3, 10]]
    reads = torch.zeros(2, 11, dtype=torch.bool)
    reads[0, 5] = True
    real = torch.ones(2, 11, dtype=torch.bool)
    real[1, :5], real[1, 8:] = False, False
    assert tokens.forced_groups(real, reads, 2).int().tolist() == [[1, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1]]


@ON
def test_positions_that_the_loss_reads_are_kept(family: str) -> None:
    """Labels in the middle: told by `labels`, by `logits_to_keep` as our objectives do, or by hand."""
    model, batch = lively(family, blocks=BLOCKS), given()
    labels = torch.full_like(batch["labels"], -100)
    labels[:, 7] = batch["input_ids"][:, 7]
    inputs = {"input_ids": batch["input_ids"]}
    told = torch.zeros(1, 16, dtype=torch.bool)
    told[:, 6] = True
    for extra in ({"labels": labels}, {"logits_to_keep": torch.tensor([6])}, {"told": told}):
        method = lemo(ratio=0.1, block=1)
        with method.on(model), method.reading(extra.pop("told", None)):
            model(**inputs, **extra)
            chosen = method._passes[-1].chosen
        assert [c.tolist() for c in chosen.values()] == [[[0, 6, 15]] * 2] * BLOCKS
        assert method.cost().share == pytest.approx(3 / 16)
    with lemo(ratio=0.1).on(model), pytest.raises(ModelError, match="which logits the loss reads"):
        model(**inputs)
    method = lemo(ratio=0.1)
    with method.on(model), method.reading(told[:, :5]), pytest.raises(ModelError, match=r"\(1, 5\).*\(2, 16\)"):
        model(**inputs)


def test_a_cache_of_training_is_left_without_keys_and_refused_later() -> None:
    model, batch = lively("llama", blocks=BLOCKS), given()
    with lemo(ratio=0.3).on(model):
        cache = model(**batch, use_cache=True).past_key_values
        assert [layer.seen for layer in cache.layers] == [16] * BLOCKS
        assert [len(layer.columns) for layer in cache.layers] == [0] * BLOCKS
        with pytest.raises(ModelError, match="no keys in this cache"):
            model(batch["input_ids"][:, :1], past_key_values=cache, labels=batch["input_ids"][:, :1])


@ON
def test_generation_is_plain_unless_always_and_then_the_prompt_alone_is_dropped(family: str) -> None:
    model = lively(family, blocks=4)
    ids, mask = prompts((12, 9))
    size = {"max_new_tokens": 6, "min_new_tokens": 6}
    plain = model.generate(ids, attention_mask=mask, **size)
    with lemo(ratio=0.3, block=1).on(model):
        assert torch.equal(model.generate(ids, attention_mask=mask, **size), plain)
    method = lemo(ratio=0.3, block=1, when="always")
    kept = {"return_dict_in_generate": True, "output_logits": True}
    with method.on(model):
        out = model.generate(ids, attention_mask=mask, **kept, **size)
        columns = method._passes[0].chosen if len(method._passes) < 4 else None
        layers = out.past_key_values.layers
        assert all(layer.seen == 17 for layer in layers)
        assert all(layer.columns[-6:].tolist() == list(range(11, 17)) for layer in layers)
        assert all(0 in layer.columns and 3 in layer.columns for layer in layers), "the first token of each row"
        assert all(layer.keys.shape[-2] == len(layer.columns) < 17 for layer in layers)
        assert columns is None or all(c.dim() == 1 for c in columns.values())
    # The same sets in one pass over everything said: what a token attends to does not depend on how it was computed.
    sets = {i: layer.columns for i, layer in enumerate(layers)}
    whole = out.sequences[:, :-1]
    full = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], dim=1)
    positions = (full.cumsum(1) - 1).clamp_min(0)
    with forced(sets, when="always").on(model), torch.no_grad():
        again = model(whole, attention_mask=full, position_ids=positions, labels=whole, use_cache=False).logits
    found = torch.stack(out.logits, dim=1)
    assert torch.allclose(found, again[:, 11:], atol=1e-3 * float(again.abs().max()))


# Calibration ------------------------------------------------------------------------------------------------------


def planted(rows: int, groups: int, dim: int, seed: int) -> Sighting:
    """Lift that a predictor of rank 2 gives exactly, of random features."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, groups, dim, generator=g)
    fixed = torch.Generator().manual_seed(100)
    wq, wk = (torch.randn(2, dim, generator=fixed) / dim**0.5 for _ in range(2))
    lift = torch.bmm(x @ wq.T, (x @ wk.T).mT) - 0.1 * (torch.arange(groups)[:, None] - torch.arange(groups)).float()
    held = torch.full((rows, groups), 2.0)
    return Sighting(x + 2, lift.exp().tril(), held, torch.zeros(rows, groups, dtype=torch.bool))


def test_a_predictor_finds_a_planted_pattern_and_its_features_are_linear() -> None:
    seen = [planted(4, 12, 8, seed) for seed in range(7)]
    query, key, distance = patterns.regress(seen[:6], 4, 0, torch.device("cpu"))
    found = patterns.predicted_lift(seen[6].features, query, key, distance)
    true = seen[6].lift
    at = torch.ones(12, 12).tril().bool()
    error = (found.log() - (true + patterns.FLOOR).log())[:, at].square().mean()
    assert float(error) < 0.1 * float((true + patterns.FLOOR).log()[:, at].var())
    again = patterns.regress(seen[:6], 4, 0, torch.device("cpu"))
    assert all(torch.equal(a, b) for a, b in zip((query, key, distance), again, strict=True))


def test_thresholds_keep_the_ratio_that_was_asked_for() -> None:
    seen = [planted(3, 20, 8, seed) for seed in range(6)]
    told = [Held.of(s, ()) for s in seen]
    for ratio in (0.2, 0.5, 0.8):
        tau = patterns.threshold(told, ratio)
        kept = sum(h.kept(ratio, tau).shape[1] / 20 for h in told) / 6
        assert kept == pytest.approx(ratio, abs=0.03)
        assert patterns.quality(told, ratio, tau) == {"kept": pytest.approx(kept), "agreement": 1.0}


@ON
def test_fit_then_train_and_the_held_out_ratio(family: str) -> None:
    model = lively(family, blocks=2)
    method = LeMo(ratio=0.5, block=2, rank=4)
    quality = method.fit(model, [given(4, 32, labelled=2, seed=s) for s in range(8)])
    assert attached(model) is None
    assert method.calibrated
    assert [q["kept"] for q in quality] == [pytest.approx(0.5, abs=0.1)] * 2
    assert all(q["agreement"] > 0.5 for q in quality)
    with method.on(model):
        assert attached(model) is method
        model(**given(4, 32, labelled=2, seed=9)).loss.backward()
    assert 0.3 < method.cost().share < 0.75
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)


class Sizes(TorchDispatchMode):
    """The most numbers that one tensor has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.most = max([self.most, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


def test_no_tensor_of_all_pairs_is_made() -> None:
    """1,024 tokens: neither exact nor predicted scores hold a number per pair, let alone per pair and head."""
    model = lively("llama", blocks=1, max_position_embeddings=1024)
    model.config.pad_token_id = None
    batch = given(1, 1024)
    del batch["attention_mask"]
    call: list[tuple[BlockCall, Pass]] = []

    class Catch(LeMo):
        def columns(self, c: BlockCall, here: Pass) -> Tensor | None:
            call.append((c, here))
            with Sizes() as sizes:
                super().columns(c, here)
            self.most = sizes.most
            return None

    for scores in ("exact", "predicted"):
        method = Catch(block=16, scores=scores, rank=4)
        method.fit(model, [given(1, 64, seed=s) for s in range(2)])
        with method.on(model):
            model(**batch)
        assert method.most <= (4 * 64 * 1024 if scores == "exact" else 1024 * 48), scores


def test_it_calibrates_by_itself_on_its_first_passes() -> None:
    model, method = lively("llama", blocks=2), LeMo(ratio=0.5, block=2, rank=4, calibration=3)
    with method.on(model):
        for step in range(5):
            with torch.no_grad():
                model(**given(2, 24, seed=90))  # evaluation is no training pass
            assert method.calibrated == (step > 3)
            model(**given(2, 24, seed=step)).loss.backward()
    assert method.cost().share < 0.9
    assert set(method.patterns.tensors) == {"thresholds", "query", "key", "distance"}
    assert method._seen == []


def test_it_calibrates_anew() -> None:
    model, method = lively("llama", blocks=1), LeMo(ratio=0.5, block=2, rank=2, calibration=1, refresh=2)
    found = []
    with method.on(model):
        for step in range(7):
            model(**given(1, 16, seed=step)).loss.backward()
            found.append(method.calibrated)
    assert found == [False, True, True, False, True, True, False]


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    def run(method: LeMo, steps: range) -> list[Tensor]:
        model = lively("llama", blocks=2)
        with method.on(model):
            return [model(**given(2, 24, seed=step)).loss.detach() for step in steps]

    options = {"ratio": 0.4, "block": 2, "rank": 4, "calibration": 3}
    whole = run(LeMo(**options), range(7))
    first, second = LeMo(**options), LeMo(**options)
    assert torch.equal(torch.stack(run(first, range(stop))), torch.stack(whole[:stop]))
    second.load_training_state({k: v.clone() for k, v in first.training_state().items()})
    assert torch.equal(torch.stack(run(second, range(stop, 7))), torch.stack(whole[stop:]))


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    model, batches = lively("llama", blocks=2), [given(2, 24, seed=s) for s in range(4)]
    method = LeMo(ratio=0.5, block=2, rank=4)
    with pytest.raises(CheckpointError, match="not calibrated"):
        method.save(tmp_path)
    method.fit(model, batches)
    assert method.save(tmp_path) == tmp_path / FILE
    again = LeMo(ratio=0.5, block=2, rank=4, state=str(tmp_path))
    assert all(torch.equal(again.patterns.tensors[k], v) for k, v in method.patterns.tensors.items())
    losses = []
    for one in (method, again):
        with one.on(model):
            losses.append(model(**batches[0]).loss)
    assert torch.equal(*losses)
    for wrong in ({"ratio": 0.25}, {"block": 4}, {"scores": "exact"}):
        with pytest.raises(CheckpointError, match=next(iter(wrong))):
            LeMo(**{"ratio": 0.5, "block": 2, **wrong, "state": str(tmp_path / FILE)})
    with pytest.raises(CheckpointError, match="there is no file"):
        LeMo(state=str(tmp_path / "nowhere"))
    with pytest.raises(ModelError, match="calibrated on 2 blocks; the model has 3"):
        again.attach(lively("llama", blocks=3))


# With others ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scores", ["exact", "predicted"])
def test_autocast_loses_no_gradient(scores: str) -> None:
    """Casts made while scores are computed must not stand in for those of the pass."""
    model = lively("llama", blocks=2)
    method = LeMo(ratio=0.5, block=2, rank=4, scores=scores)
    method.fit(model, [given(seed=s) for s in range(2)])
    with method.on(model), torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**given(seed=3)).loss
    loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "proj" in n)


def test_bfloat16_and_an_adapter() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(lively("qwen2", blocks=2).to(torch.bfloat16), config)
    method = LeMo(ratio=0.5, block=2, rank=4, calibration=1)
    with method.on(model):
        for step in range(2):
            model(**given(seed=step)).loss.backward()
    assert all(bool(p.grad.any()) for n, p in model.named_parameters() if p.requires_grad)
    assert method.patterns.tensors["query"].dtype == torch.float32


def test_what_it_cannot_run_is_named() -> None:
    model, batch = lively("llama", blocks=2), given()
    with lemo().on(model):
        with pytest.raises(ModelError, match="begin anew"):
            model(**batch, position_ids=torch.tensor([[0, 1, 2, 3] * 4]))
        with pytest.raises(ModelError, match=r"mask of \(batch, length\)"):
            model(**{**batch, "attention_mask": torch.ones(2, 1, 16, 16, dtype=torch.bool)})
        with pytest.raises(ModelError, match="not its body"):
            model.model(batch["input_ids"])
    with pytest.raises(RecipeError, match="padding_free"):
        Recipe(inference=["lemo"], data={"train": "x", "padding_free": True}).check()
    uses = [use for group in Recipe(inference=["lemo"], optimizer="mezo").uses().values() for use in group]
    with pytest.raises(RecipeError, match="lemo cannot be combined with mezo"):
        check_combination(uses, {})
    with pytest.raises(ModelError, match="no batches"):
        lemo(select="threshold").fit(model, [])


def test_attention_that_cannot_be_seen_is_named() -> None:
    config = T.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = T.BloomForCausalLM(config)
    with pytest.raises(ModelError, match="Bloom"), lemo(ratio=0.5).on(model):
        model(**given())


def test_a_run_by_a_recipe_calibrates_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[LeMo] = []
    attach = LeMo.attach
    monkeypatch.setattr(LeMo, "attach", lambda self, model: (made.append(self), attach(self, model))[1])
    data = write_rows(tmp_path / "rows.jsonl", rows(40))
    reports = []
    for name in ("one", "two"):
        spec = {"name": "lemo", "ratio": 0.3, "block": 1, "rank": 4, "calibration": 2}
        fields: dict[str, Any] = {"data.train": str(data), "train.steps": 5, "train.batch_size": 4}
        fields |= {"report.generate_rows": 1, "report.retain_rows": 1, "report.max_new_tokens": 2}
        found = run(None, model="tiny-lm-s", output=str(tmp_path / name), inference=[spec], **fields)
        reports.append(found)
    assert all(one.calibrated and one.cost().share < 1 for one in made)
    assert len(made) == 2
    assert any("padded, for lemo" in str(note) for note in vars(reports[0]).values())
    assert reports[0].figure("loss").value == reports[1].figure("loss").value
    assert reports[0].figure("loss").value < reports[0].figure("loss").before
