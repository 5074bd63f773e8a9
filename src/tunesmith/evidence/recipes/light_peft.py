"""Light-PEFT: planted redundancy is found, what is cut is what was masked, and how a ViT cut by a third is tuned."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ViTForImageClassification

from tunesmith.adapters.structure_masks import StructureMasks
from tunesmith.core.bridge import adapter, stack
from tunesmith.core.optimizer import set_lr_ratios
from tunesmith.core.seeds import generator, seed_of
from tunesmith.core.surgery import Structure, prune, sites
from tunesmith.core.tuner_layer import TunesmithLayer
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.objectives.mask_sparsity import MaskSparsity
from tunesmith.recipes.light_peft_cuts import Cuts, decide, reduce, score

RANK, ALPHA, SPARSITY, ESTIMATION, TUNING, ROWS, RATES = 8, 16.0, 1e-4, 100, 200, 64, (3e-3, 1e-2)
Batch = Mapping[str, Any]

CLAIM = Claim(
    "light-peft",
    says="More than 40 % of the backbone is removed and 25 % of the trainable parameters of the original method are "
    "left while performance stays comparable; training takes 39 % less memory and is 1.6 times faster, inference "
    "takes 48 % less memory and is 1.6 times faster.",
    where="abstract",
    ran="On small BERTs: cut models against masked ones, and what is planted as redundant. Then a ViT of 3 blocks, "
    "width 48 and 6 heads, trained for 300 steps on the digits, is tuned to digits turned by a quarter and "
    "moved by up to a pixel, each way with two learning rates chosen by accuracy on other pictures: LoRA of "
    "rank 8 on all layers for 300 steps; 100 steps of estimation, the cuts of the paper and 200 steps; and the "
    "same with everything that is cut drawn at random. The head trains in all. Accuracy is of unseen pictures; "
    "seconds are processor time on 360 of them, the shortest of 9 passes taken in turn.",
    not_held="LoRA on the whole model reaches 67 %, the cut model 39 %, random cuts 34 % (medians; the cut model is "
    "ahead of random cuts with two seeds of three). Probably the task is too far from what the model knows (9 "
    "% at first) and the steps too few: the best rate is the largest of both tried for every way, and about a "
    "tenth of the trainable numbers, which begin anew after the cuts, have 200 steps to learn it. The paper "
    "tunes large models to tasks that are near to what they know. Other settings were not tried.",
)


# Small BERTs ------------------------------------------------------------------------------------------------------


def _bert(seed: int = 0) -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=32,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=96,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return kit_digits.seeded(lambda: BertForSequenceClassification(config).eval(), seed)


def _sentences(count: int, seed: int) -> list[Batch]:
    """Batches of 32 rows of 12 tokens; the label is the first token modulo 3, the rest is padding at times."""
    g = generator(seed, "sentences")
    found: list[Batch] = []
    for _ in range(count):
        ids = torch.randint(3, 32, (32, 12), generator=g)
        mask = (torch.arange(12) < torch.randint(6, 13, (32, 1), generator=g)).long()
        found.append({"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3})
    return found


def _wrapped(
    base: nn.Module,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    save: Sequence[str] = (),
    masks: Mapping[str, Any] | None = None,
) -> Any:
    low = adapter("qlora", rank=RANK, alpha=ALPHA, target_modules=targets, modules_to_save=save or None)
    return kit_digits.seeded(
        lambda: get_peft_model(base, stack(low, adapter("structure-masks", **(masks or {})))), seed
    )


def _train(model: nn.Module, batches: Sequence[Batch], lr: float, sparsity: float = 0.0) -> nn.Module:
    """AdamW, linear decay."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    set_lr_ratios(optimizer, model)
    term = MaskSparsity()
    model.train()
    for i, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_ratio", 1.0) * (1 - i / len(batches))
        loss = model(**batch).loss
        if sparsity:
            loss = loss + sparsity * term(model, batch)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch).logits


@CLAIM.exact
def cut_equals_masked() -> list[Check]:
    """A model cut by an estimated plan gives the logits of the estimated one with what is cut masked, the rest at 1."""
    model = _train(_wrapped(_bert()), _sentences(30, 0), 1e-2, SPARSITY)
    batches = _sentences(2, 1)
    plan = decide(score(model, batches), Cuts())
    reference, folded = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for layer in (m for m in reference.modules() if isinstance(m, TunesmithLayer)):
            for made in layer.active():
                name = layer.spec.name
                if isinstance(made, StructureMasks):
                    stays = plan["heads"].get(name) or plan["neurons"][name]
                    made.factors.zero_()[stays] = 1
                else:
                    gone = [j for j in range(RANK) if j not in plan["ranks"].get(name, ())]
                    made.A[gone] = 0
    before = sum(p.numel() for p in _bert().parameters())
    whole, expected = _logits(model, batches[0]), _logits(reference, batches[0])
    small = reduce(model, plan)
    kept = reduce(folded, plan, folding=True)
    return [
        Check("largest difference of a logit", float((_logits(small, batches[0]) - expected).abs().max()), "<=", 1e-5),
        Check("difference from the model before", float((whole - expected).abs().max()), ">=", 0.1),
        Check("parameters left, %", 100 * sum(p.numel() for p in small.parameters()) / before, "<=", 75),
        Check("folding changes logits by", float((_logits(kept, batches[0]) - expected).abs().max()), ">=", 1e-3),
    ]


@CLAIM.exact
def ones_change_nothing() -> list[Check]:
    """Masks of ones leave the logits as they are, to the bit, and cutting nothing leaves the weights so."""
    base, batch = _bert(), _sentences(1, 0)[0]
    expected = _logits(base, batch)
    masked = get_peft_model(_bert(), adapter("structure-masks"))
    every: dict[str, dict[str, list[int]]] = {"heads": {}, "neurons": {}}
    for site in sites(base).values():
        every[site.kind][site.output] = list(range(site.count))
    uncut = prune(_bert(), Structure(**every))
    return [
        Check("largest difference, masks", float((_logits(masked, batch) - expected).abs().max()), "==", 0),
        Check("largest difference, nothing cut", float((_logits(uncut, batch) - expected).abs().max()), "==", 0),
    ]


@CLAIM.exact
def planted_redundancy_goes() -> list[Check]:
    """Heads and neurons that nothing reads, and ranks that do nothing, are exactly those that are cut."""
    base, dead = _train(_bert(), _sentences(150, 2), 1e-3), {"heads": [1, 4], "neurons": list(range(0, 96, 3))}
    found = sites(base)
    with torch.no_grad():
        for site in found.values():
            columns = [i * site.size + j for i in dead[site.kind] for j in range(site.size)]
            base.get_submodule(site.output).weight[:, columns] = 0
    # Adapters that read the planted heads would bring them back to life. The rates are the paper's and, for the masks,
    # those of the released trainer: in so many steps a factor that nothing but the L1 term moves reaches 0.
    targets = ["query", "key", "value", "intermediate.dense"]
    wrapped = _wrapped(base, targets=targets, masks={"head_lr": 100.0, "neuron_lr": 50.0})
    model = _train(wrapped, _sentences(200, 0), 3e-4, SPARSITY)
    idle = [0, 3, 5, 6]
    lows = {m.spec.name: m.active()[0] for m in model.modules() if isinstance(m, TunesmithLayer) and m.active()}
    with torch.no_grad():
        for made in lows.values():
            if hasattr(made, "A"):
                made.A[idle], made.B[:, idle] = 0, 0
    plan = decide(score(model, _sentences(4, 1)), Cuts(modules=0))
    left = {kind: sum(len(set(s) & set(indices)) for s in plan[kind].values()) for kind, indices in dead.items()}
    every = {kind: sum(map(len, plan[kind].values())) for kind in dead}
    kept = [set(stays) for stays in plan["ranks"].values()]
    return [
        Check("dead heads kept of 8", left["heads"], "==", 0),
        Check("living heads kept of 16", every["heads"] - left["heads"], "==", 16),
        Check("dead neurons kept of 128", left["neurons"], "==", 0),
        Check("neurons kept of 384", every["neurons"], "==", 256),
        Check("idle ranks kept", sum(len(stays & set(idle)) for stays in kept), "==", 0),
        Check("ranks kept", sum(map(len, kept)), "==", RANK // 2 * len(kept)),
    ]


@CLAIM.exact
def the_rank_score_is_a_slope() -> list[Check]:
    """A rank's score is the slope of the loss along the size of its component, times 1/in + 1/out."""
    model = _train(_wrapped(_bert()), _sentences(30, 0), 1e-2)
    batch, name = _sentences(1, 1)[0], "bert.encoder.layer.2.intermediate.dense"
    found = score(model, [batch])[f"rank/{name}"]
    layer = model.get_base_model().get_submodule(name)
    low, B = layer.active()[0], layer.active()[0].B.detach().clone()
    out_features, in_features = layer.spec.shape
    worst = 0.0
    for j in range(RANK):
        losses = []
        for size in (1.01, 0.99):
            with torch.no_grad():
                low.B.copy_(B)[:, j] *= size
                losses.append(float(model(**batch).loss.double()))
        slope = abs(losses[0] - losses[1]) / 0.02
        worst = max(worst, abs(float(found[j]) - slope * (1 / in_features + 1 / out_features)))
    return [
        Check("largest difference / largest score", worst / float(found.max()), "<=", 0.05),
        Check("largest score", float(found.max()), ">=", 1e-4),
    ]


@CLAIM.exact
def a_quarter_trains() -> list[Check]:
    """The adapter that is left has at most a quarter of the numbers, and the cuts are the shares asked, ties or not."""
    model = _train(_wrapped(_bert()), _sentences(10, 0), 1e-2, SPARSITY)
    scores = score(model, _sentences(2, 1))
    before = sum(made.A.numel() + made.B.numel() for made in _lows(model).values())
    checks = []
    for title, given in (("", scores), (", all scores equal", {n: torch.ones_like(v) for n, v in scores.items()})):
        given = {n: scores[n] if n.startswith("share/") else v for n, v in given.items()}
        plan = decide(given, Cuts())
        small = reduce(copy.deepcopy(model), plan)
        after = 0
        for name, stays in plan["ranks"].items():
            after += len(stays) * sum(small.get_submodule(name).weight.shape)
        checks += [
            Check(f"trainable numbers left{title}, %", 100 * after / before, "<=", 27),
            Check(f"heads left of 24{title}", sum(map(len, plan["heads"].values())), "==", 16),
            Check(f"neurons left of 384{title}", sum(map(len, plan["neurons"].values())), "==", 256),
        ]
    return checks


def _lows(model: nn.Module) -> dict[str, Any]:
    layers = [m for m in model.modules() if isinstance(m, TunesmithLayer)]
    return {m.spec.name: made for m in layers for made in m.active() if hasattr(made, "B")}


# Digits -----------------------------------------------------------------------------------------------------------


def _vit(seed: int) -> ViTForImageClassification:
    config = kit_digits.vit(seed, width=48, blocks=3).config
    config.num_attention_heads = 6
    return kit_digits.seeded(lambda: ViTForImageClassification(config), seed)


def _pictures(x: Tensor, y: Tensor, steps: int, seed: int) -> list[Batch]:
    g = generator(seed, "rows")
    drawn = [torch.randint(len(x), (ROWS,), generator=g) for _ in range(steps)]
    return [{"pixel_values": kit_digits.shifted(x[r], seed_of(seed, i)), "labels": y[r]} for i, r in enumerate(drawn)]


def _low_rank(base: nn.Module, ranks: Mapping[str, int] | None, seed: int) -> Any:
    """LoRA on all layers, or of these ranks with the same alpha / r; the head trains beside it."""
    groups: list[Any] = [{}]
    if ranks is not None:
        groups = [{"rank": r, "ranks": {n: k for n, k in ranks.items() if k == r}} for r in sorted(set(ranks.values()))]
    configs = [
        adapter(
            "qlora", **{"rank": RANK, **g}, alpha=ALPHA * g.get("rank", RANK) / RANK, modules_to_save=["classifier"]
        )
        for g in groups
    ]
    return kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), stack(*configs)), seed)


def _tuned(estimated: nn.Module, scores: Mapping[str, Tensor], batches: Sequence[Batch], lr: float, seed: int) -> Any:
    plan = decide(scores, Cuts())
    small = reduce(copy.deepcopy(estimated), plan)
    left = {name: len(stays) for name, stays in plan["ranks"].items()}
    return _train(_low_rank(small, left, seed), batches, lr)


def _drawn(scores: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random scores of the same shapes."""
    g = generator(seed, "drawn")
    return {n: v if n.startswith("share/") else torch.rand(v.shape, generator=g) for n, v in scores.items()}


@torch.no_grad()
def _seconds(models: Sequence[nn.Module], x: Tensor) -> list[float]:
    shortest = [float("inf")] * len(models)
    for _ in range(9):
        for i, model in enumerate(models):
            began = time.process_time()
            model(x)
            shortest[i] = min(shortest[i], time.process_time() - began)
    return shortest


@CLAIM.comparison
def turned_digits(seed: int) -> dict[str, float]:
    """Accuracy of each way at its learning rate, and what is left of the model."""
    data = kit_digits.load()
    base = kit_digits.train(_vit(seed), *data.train, steps=300, lr=3e-3, seed=seed)
    new = data.each(lambda x: kit_digits.turned(x, 1))
    chosen, reported = (
        (kit_digits.shifted(x, seed_of(seed, use)), y)
        for use, (x, y) in (("choose", new.validation), ("report", new.test))
    )
    batches = _pictures(*new.train, ESTIMATION + TUNING, seed)
    candidates: dict[str, list[nn.Module]] = {"lora": [], "light": [], "random": []}
    for lr in RATES:
        candidates["lora"].append(_train(_low_rank(base, None, seed), batches, lr))
        wrapped = _wrapped(copy.deepcopy(base), seed, save=["classifier"])
        estimated = _train(wrapped, batches[:ESTIMATION], lr, SPARSITY)
        scores = score(estimated, batches[:ESTIMATION:10])
        later = batches[ESTIMATION:]
        candidates["light"].append(_tuned(estimated, scores, later, lr, seed))
        candidates["random"].append(_tuned(estimated, _drawn(scores, seed), later, lr, seed))
    figures = {"base": kit_digits.accuracy(base, *reported)}
    best: dict[str, Any] = {}
    for name, models in candidates.items():
        at = [kit_digits.accuracy(model, *chosen) for model in models]
        best[name] = models[at.index(max(at))]
        figures[name] = kit_digits.accuracy(best[name], *reported)
        figures[f"{name}_rate"] = RATES[at.index(max(at))]
    whole, small = (best[name].merge_and_unload() for name in ("lora", "light"))
    figures["seconds_before"], figures["seconds_after"] = _seconds([whole, small], reported[0])
    blocks = [sum(p.numel() for p in model.vit.layers.parameters()) for model in (whole, small)]
    figures["blocks_left"] = 100 * blocks[1] / blocks[0]
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """The card's thresholds."""
    faster = figures.median("seconds_after") / figures.median("seconds_before")
    return [
        Check(
            "accuracy - LoRA's on the whole model, points", figures.median("light") - figures.median("lora"), ">=", -2
        ),
        Check("accuracy - random cuts', points", figures.median("light") - figures.median("random"), ">=", 0.25),
        Check("seconds of a forward pass / before", faster, "<=", 0.99),
        Check("parameters of the blocks left, %", figures.median("blocks_left"), "<=", 75),
    ]
