"""Bone: blocks, ranks, merging and PEFT's three forms, exactly; a change made of blocks against a LoRA of its size."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from peft import MissConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.bone import Bone
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim, Figures

FORMS: dict[str, dict[str, Any]] = {"bat": {}, "miss": {}, "mini": {"mini_rank": 4}}
THEIRS: dict[str, dict[str, Any]] = {
    "bat": {"init_weights": "bat"},
    "miss": {"init_weights": True},
    "mini": {"init_weights": "mini", "mini_r": 4},
}
RANK = 4
DIM, STEPS, ROWS, RATES = 32, 1500, 64, (3e-3, 1e-2, 3e-2)
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    "bat": ("bone", {"rank": RANK}),
    "miss": ("bone", {"rank": RANK, "form": "miss"}),
    "lora": ("lora", {"rank": 2, "alpha": 2.0}),
}

CLAIM = Claim(
    "bone",
    says="Guided by the original weights, Bone beats PiSSA and LoRA at their size without any initialisation: "
    "Llama-2-7B tuned on MetaMathQA reaches 49.36 on GSM8K and 8.8 on MATH, 5.84 and 1.96 points more than PiSSA.",
    where="abstract of arXiv:2409.15371v3",
    ran="Identities on single layers and a small Llama, the three forms against PEFT's MiSS with the same blocks. Then "
    "a 32 x 32 linear layer with random weights W learns from 1500 batches of 64 normal inputs with Adam, the rate "
    "falling linearly to zero, to be what a teacher made of W: by blocks, W_ij + W_ij B_i + B_i with random 4 x 4 "
    "blocks, and by a dense random change, W (I + E). Bone (bat, r = 4), MiSS (r = 4) and LoRA (r = 2) train 128 "
    "numbers each; each has three learning rates a factor of about 3 apart and is reported at its best. The loss is "
    "relative to no change; the least that any change of rank 2 can reach is beside it. The paper's experiment needs a "
    "7B model.",
)


def _random(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, key))


def _adapted(form: str, base: nn.Module) -> nn.Module:
    config = tunesmith.adapter("bone", rank=RANK, form=form, **FORMS[form])
    return get_peft_model(copy.deepcopy(base), config).eval()


def _moved(model: nn.Module, size: float = 0.3) -> nn.Module:
    """With the blocks off zero, the same ones whoever holds them."""
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.copy_(size * _random(*p.shape, key=f"moved {i}"))
    return model


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    ids = torch.randint(kit_text.BYTES, (2, 16), generator=generator(0, "ids"))
    return model.eval()(input_ids=ids).logits


def _layers() -> Iterator[tuple[str, Bone, nn.Linear]]:
    """One layer of 16 to 24 features for each form, moved off its start."""
    for form, options in FORMS.items():
        layer = kit_digits.seeded(lambda: nn.Linear(16, 24), 0)
        made = Bone(describe(layer, "layer"), rank=RANK, **{"form": form, **options})
        _moved(made)
        yield form, made, layer


@CLAIM.exact
def starts_at_the_base() -> Check:
    """With zero blocks every form computes what the base computes."""
    base = kit_text.model(2, 0)
    worst = max(float((_logits(_adapted(form, base)) - _logits(base)).abs().max()) for form in FORMS)
    return Check("largest difference of a logit", worst, "<=", 1e-6)


@CLAIM.exact
def weight_is_that_of_the_equations() -> list[Check]:
    """The weight, entry by entry from the equations, and the forward pass through it."""
    by_weight = by_forward = 0.0
    for form, made, layer in _layers():
        W, D = layer.weight.detach(), made.blocks.detach()
        wanted = W.clone()
        for o in range(24):
            for c in range(16):
                if form == "bat":
                    B, block = D[o // RANK], slice(c // RANK * RANK, c // RANK * RANK + RANK)
                    wanted[o, c] += W[o, block] @ B[:, c % RANK] + B[o % RANK, c % RANK]
                else:
                    wanted[o, c] += D[c % RANK, o % D.shape[1]]
        by_weight = max(by_weight, float((made.weight(W) - wanted).detach().abs().max()))
        x = _random(7, 16, key="x")
        out = made(x, stacked(layer, made.layer, []))
        by_forward = max(by_forward, float((out - x @ wanted.T - layer.bias).detach().abs().max()))
    return [
        Check("largest difference of an entry of W'", by_weight, "<=", 1e-5),
        Check("largest difference of an output", by_forward, "<=", 1e-5),
    ]


@CLAIM.exact
def equals_peft() -> Check:
    """A small Llama with the same blocks in PEFT's MiSS, `init_weights` "bat", True and "mini"."""
    base, worst = kit_text.model(2, 0), 0.0
    targets = [name for name, m in base.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
    for form, theirs in THEIRS.items():
        config = MissConfig(r=RANK, target_modules=targets, **theirs)
        peft = _moved(get_peft_model(copy.deepcopy(base), config), 0.05)
        worst = max(worst, float((_logits(_moved(_adapted(form, base), 0.05)) - _logits(peft)).abs().max()))
    return Check("largest difference of a logit", worst, "<=", 1e-5)


@CLAIM.exact
def rank_of_the_change() -> list[Check]:
    """The frozen blocks make the change of `bat` full rank; the other forms stay at r."""
    ranks = {}
    for form, made, layer in _layers():
        change = made._change(layer.weight.detach().double(), made.blocks.detach().double())
        ranks[form] = int(torch.linalg.matrix_rank(change.double(), rtol=1e-6))
    return [
        Check("rank of the change of a 24 x 16 weight, bat, r = 4", ranks["bat"], "==", 16),
        Check("miss, r = 4", ranks["miss"], "<=", RANK),
        Check("mini, r = 4", ranks["mini"], "<=", RANK),
    ]


@CLAIM.exact
def the_blocks_guide() -> list[Check]:
    """A block of zeros is changed by B_i itself, and equal blocks of one band are changed equally."""
    _, made, layer = next(_layers())
    W, B = layer.weight.detach().clone(), made.blocks.detach()
    W[:, :4] = 0
    W[:, 8:12] = W[:, 4:8]
    change = (made.weight(W) - W).detach()
    return [
        Check("largest difference from B_i", float((change[:, :4] - B.reshape(24, 4)).abs().max()), "<=", 1e-6),
        Check("between equal blocks", float((change[:, 8:12] - change[:, 4:8]).abs().max()), "<=", 1e-6),
        Check("change of the others beyond B_i", float((change[:, 4:] - change[:, :4].repeat(1, 3)).std()), ">=", 0.05),
    ]


@CLAIM.exact
def merging_and_unmerging() -> list[Check]:
    """Merged equals unmerged, and the base comes back to the bit where an inverse of I + B_i would lose it."""
    base, apart, changed = kit_text.model(2, 0), 0.0, 0
    for form in FORMS:
        model = _moved(_adapted(form, base), 0.05)
        expected = _logits(model)
        model.merge_adapter()
        apart = max(apart, float((_logits(model) - expected).abs().max() / expected.abs().max()))
        model.unmerge_adapter()
        kept = model.unload().state_dict()
        changed += sum(not torch.equal(kept[name], tensor) for name, tensor in base.state_dict().items())
    return [
        Check("largest difference of a logit, relative to the largest", apart, "<=", 1e-5),
        Check("tensors of the base that differ afterwards", changed, "==", 0),
        Check("error of PEFT's inverse, |I + B_i| = 1e-5 in one direction", _peft_unmerged(), ">=", 1e-4),
    ]


@torch.no_grad()
def _peft_unmerged() -> float:
    """Largest change of a weight of size 1 that PEFT merges and unmerges; one singular value of I + B_i is 1e-5."""
    model = nn.Sequential(nn.Linear(16, 24, bias=False))
    W = model[0].weight.copy_(_random(24, 16, key="W")).clone()
    held: Any = get_peft_model(model, MissConfig(r=RANK, target_modules=["0"], init_weights="bat"))
    U, S, Vh = torch.linalg.svd(torch.eye(RANK) + 0.3 * _random(6, RANK, RANK, key="B"))
    S[:, -1] = 1e-5
    held.base_model.model[0].miss_block["default"].copy_(U * S[:, None] @ Vh - torch.eye(RANK))
    held.merge_adapter()
    held.unmerge_adapter()
    return float((held.base_model.model[0].base_layer.weight - W).abs().max())


@CLAIM.exact
def counts() -> list[Check]:
    """Trained numbers of one 24 x 16 layer: out x r, out x r, and r x m."""
    found = {form: made.trainable_count() for form, made, _ in _layers()}
    return [
        Check("bat", found["bat"], "==", 24 * RANK),
        Check("miss", found["miss"], "==", 24 * RANK),
        Check("mini, m = 4", found["mini"], "==", RANK * 4),
    ]


class _Student(nn.Module):
    def __init__(self, W: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, DIM, bias=False)
        self.layer.weight.data.copy_(W)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _start(seed: int) -> Tensor:
    return torch.randn(DIM, DIM, generator=generator(seed, "start")) / DIM**0.5


def _teacher(kind: str, W: Tensor, seed: int) -> Tensor:
    g, n = generator(seed, kind), DIM // RANK
    if kind == "dense":
        return W @ (torch.eye(DIM) + 0.3 * torch.randn(DIM, DIM, generator=g) / DIM**0.5)
    B = 0.3 * torch.randn(n, RANK, RANK, generator=g)
    blocks = W.view(n, RANK, n, RANK)
    return (blocks + torch.einsum("iajk,ikc->iajc", blocks, B) + B[:, :, None]).reshape(DIM, DIM)


def _tuned(side: str, teacher: Tensor, W: Tensor, lr: float, seed: int) -> Tensor:
    """The student's weight after training."""
    slug, options = SIDES[side]
    config = tunesmith.adapter(slug, target_modules=["layer"], **options)
    model = kit_digits.seeded(lambda: get_peft_model(_Student(W), config), seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == DIM * RANK
    optimizer, g = torch.optim.Adam(trained, lr=lr), generator(seed, "inputs")
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / STEPS)
        x = torch.randn(ROWS, DIM, generator=g)
        (model(x) - x @ teacher.T).square().sum(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.merge_and_unload().layer.weight.detach()


@CLAIM.comparison
def teachers(seed: int) -> dict[str, float]:
    """Loss relative to no change at the best rate of each side: a ratio of squared Frobenius norms."""
    W, figures = _start(seed), dict[str, float]()
    for kind in ("blocks", "dense"):
        teacher = _teacher(kind, W, seed)
        for side in SIDES:
            losses = {
                lr: float((_tuned(side, teacher, W, lr, seed) - teacher).square().sum() / (W - teacher).square().sum())
                for lr in RATES
            }
            best = min(losses, key=losses.__getitem__)
            figures |= {f"{kind}_{side}": losses[best], f"{kind}_{side}_rate": best}
        S = torch.linalg.svdvals(teacher - W).square()
        figures[f"{kind}_best_of_rank_2"] = float(S[2:].sum() / S.sum())
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """On the planted change. The dense teacher, on which LoRA is better, and MiSS are reported beside."""
    return [
        Check("relative loss of Bone on a teacher of blocks", figures.median("blocks_bat"), "<=", 0.01),
        Check("relative loss of LoRA on it", figures.median("blocks_lora"), ">=", 0.2),
    ]
