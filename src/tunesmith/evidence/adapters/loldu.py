"""LoLDU: the decomposition, the gradient and the span, exactly; what a few diagonal entries add to a trained head."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.loldu import LoLDU, ldu
from tunesmith.core.adapter import stacked
from tunesmith.core.layer import describe
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits
from tunesmith.evidence.claim import Check, Claim, Figures

SHAPES = ((24, 24), (40, 16), (16, 40))
RANK, ALPHA = 8, 16.0
BODY, STEPS, RATES = ["first", "second"], 300, (6e-3, 2e-2, 6e-2)
SIDES: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"r{rank}": ("loldu", {"rank": rank}) for rank in (8, 32, 64)},
    "lora": ("lora", {"rank": 8}),
}

CLAIM = Claim(
    "loldu",
    says="Training the diagonal of an LDU decomposition alone is comparable to other methods with 2600 times fewer "
    "trained parameters than they have, on LLaMA2, RoBERTa, ViT and Stable Diffusion.",
    where="abstract",
    ran="Identities on single layers and a small ViT. Then an MLP of 64, 96, 96 and 10 units, trained for 500 steps on "
    "mirrored digits, is tuned on the digits for 300 Adam steps of 64: its head alone, and its head with LoLDU on both "
    "hidden layers at ranks 8, 32 and 64 (16, 64 and 128 numbers). Each side has three learning rates a factor of "
    "about 3 apart, chosen on other pictures than the accuracy reported. LoRA of rank 8 on the same layers (2,816 "
    "numbers) is reported beside.",
)


def _random(*shape: int, key: str) -> Tensor:
    return torch.randn(shape, generator=generator(0, key))


def _prepared(shape: tuple[int, int], **options: Any) -> tuple[nn.Linear, LoLDU]:
    """A random layer with LoLDU as it starts."""
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data.copy_(_random(*shape, key="weight"))
    made = LoLDU(describe(layer, "layer"), **{"rank": RANK, "alpha": ALPHA, **options})
    made.prepare(layer.weight.detach(), {})
    return layer, made


def _vit(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A small ViT, and the same with LoLDU on the linear layers of its blocks."""
    base = kit_digits.vit(0, width=32, blocks=2).eval()
    return base, get_peft_model(copy.deepcopy(base), tunesmith.adapter("loldu", **{"rank": RANK, **options})).eval()


def _layers(model: nn.Module) -> list[LoLDU]:
    return [m for m in model.modules() if isinstance(m, LoLDU)]


def _trained(model: nn.Module) -> nn.Module:
    return kit_digits.train(model, *kit_digits.load().train, steps=20, lr=3e-2, seed=0)


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    return kit_digits.logits(model.eval(), kit_digits.load().test[0])


@CLAIM.exact
def factors_are_those_of_the_whole_decomposition() -> list[Check]:
    """r steps of elimination give the first r columns, entries and rows of torch's LU; all steps give the weight."""
    apart = rebuilt = 0.0
    for m, n in SHAPES:
        W = _random(m, n, key="weight").double()
        P, L, U = torch.linalg.lu(W)
        D = U.diagonal()
        for rank in (1, RANK, min(m, n)):
            left, diagonal, right, _ = ldu(W, rank)
            wanted = ((P @ L)[:, :rank], D[:rank], U[:rank] / D[:rank, None])
            apart = max(
                apart, *(float((a - b).abs().max()) for a, b in zip((left, diagonal, right), wanted, strict=True))
            )
        rebuilt = max(rebuilt, float((left * diagonal @ right - W).abs().max()))
    return [
        Check("largest difference of an entry", apart, "<=", 1e-8),
        Check("largest difference of P L D U from W at full rank", rebuilt, "<=", 1e-10),
    ]


@CLAIM.exact
def starts_at_the_base() -> Check:
    """Before training the outputs are the base's: square, tall and wide layers, and a ViT."""
    base, model = _vit()
    worst = float((_logits(model) - _logits(base)).abs().max())
    for shape in SHAPES:
        layer, made = _prepared(shape)
        x = _random(5, shape[1], key="x")
        worst = max(worst, float((made(x, stacked(layer, made.layer, [])) - layer(x)).detach().abs().max()))
    return Check("largest difference", worst, "<=", 1e-5)


@CLAIM.exact
def gradient_is_that_of_the_formula() -> Check:
    """The gradient of z_i is s (L_r^T P^T G U_r^T)_ii, with G the gradient of the weight."""
    worst = 0.0
    for shape in SHAPES:
        layer, made = _prepared(shape)
        P, L, U = torch.linalg.lu(layer.weight.detach().double())
        x, wanted = _random(5, shape[1], key="x"), _random(5, shape[0], key="wanted")
        loss = (made(x, stacked(layer, made.layer, [])) - wanted).square().mean()
        (found,) = torch.autograd.grad(loss, made.z)
        (G,) = torch.autograd.grad((layer(x) - wanted).square().mean(), layer.weight)
        right = U[:RANK] / U.diagonal()[:RANK, None]
        expected = ALPHA / RANK * ((P @ L)[:, :RANK].T @ G.double() @ right.T).diagonal()
        worst = max(worst, float((found - expected).norm() / expected.norm()))
    return Check("largest relative error", worst, "<=", 1e-5)


@CLAIM.exact
def what_trains_and_what_is_saved() -> list[Check]:
    """r numbers per layer, one more with the scale; the file has two more per entry, and no factor."""
    wrong = extra = 0
    for train_scale in (False, True):
        _, model = _vit(train_scale=train_scale)
        layers = len(_layers(model))
        wrong += abs(model.get_nb_trainable_parameters()[0] - layers * (RANK + train_scale))
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            saved = load_file(Path(folder) / "adapter_model.safetensors")
        extra += abs(sum(t.numel() for t in saved.values()) - layers * (3 * RANK + train_scale))
    largest = max(t.numel() for t in _prepared((96, 64))[1].state_dict(keep_vars=True).values())
    return [
        Check("trained numbers besides those", wrong, "==", 0),
        Check("saved numbers besides 3 r per layer", extra, "==", 0),
        Check("numbers of the largest saved tensor of a 96 x 64 layer", largest, "==", RANK),
    ]


@CLAIM.exact
def change_stays_in_the_span() -> list[Check]:
    """After training the change of every weight has rank r at most, between the first columns of L and rows of U."""
    base, model = _vit()
    rank, outside, moved = 0, 0.0, 1.0
    for made in _layers(_trained(model)):
        W: Tensor = base.get_submodule(made.layer.name).weight.detach().double()
        change = (made.weight(W) - W).detach()
        P, L, U = torch.linalg.lu(W)
        columns, rows = torch.linalg.qr((P @ L)[:, :RANK])[0], torch.linalg.qr(U[:RANK].T)[0]
        inside = columns @ (columns.T @ change @ rows) @ rows.T
        outside = max(outside, float((change - inside).norm() / change.norm()))
        rank = max(rank, int(torch.linalg.matrix_rank(change, rtol=1e-5)))
        moved = min(moved, float(change.norm() / W.norm()))
    return [
        Check("largest rank", rank, "<=", RANK),
        Check("largest share outside of the span", outside, "<=", 1e-5),
        Check("smallest change, relative to the weight", moved, ">=", 1e-3),
    ]


@CLAIM.exact
def export_is_a_lora_of_rank_r() -> list[Check]:
    """Exported it is a plain LoRA of rank r, and merged it is a plain model, with the trained logits."""
    base, model = _vit()
    trained = _logits(_trained(model))
    with TemporaryDirectory() as folder:
        tunesmith.export_lora(model, Path(folder) / "lora")
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), f"{folder}/lora")
    return [
        Check("largest difference of a logit, exported", float((_logits(loaded) - trained).abs().max()), "<=", 1e-5),
        Check("merged", float((_logits(model.merge_and_unload()) - trained).abs().max()), "<=", 1e-5),
        Check("largest change of a logit by training", float((trained - _logits(base)).abs().max()), ">=", 0.1),
        Check("rank", loaded.peft_config["default"].r, "==", RANK),
    ]


@CLAIM.exact
def weights_without_pivots() -> list[Check]:
    """A column of zeros and one that depends on others: finite factors, the base's outputs, a finite gradient."""
    layer, made = _prepared((24, 24), rank=24)
    W = layer.weight.data
    W[:, 3], W[:, 7] = 0, W[:, 1] - 2 * W[:, 5]
    made.prepare(layer.weight.detach(), {})
    x = _random(5, 24, key="x")
    out = made(x, stacked(layer, made.layer, []))
    out.square().sum().backward()
    assert made.z.grad is not None
    return [
        Check("largest entry of the factors", float(max(made.left.abs().max(), made.right.abs().max())), "<=", 100),
        Check("largest difference of an output", float((out - layer(x)).detach().abs().max()), "<=", 1e-5),
        Check("entries of the gradient that are not finite", int((~made.z.grad.isfinite()).sum()), "==", 0),
    ]


def _mlp(seed: int) -> nn.Sequential:
    def make() -> nn.Sequential:
        return nn.Sequential(
            OrderedDict(
                flat=nn.Flatten(),
                first=nn.Linear(64, 96),
                relu=nn.ReLU(),
                second=nn.Linear(96, 96),
                relu2=nn.ReLU(),
                head=nn.Linear(96, 10),
            )
        )

    return kit_digits.seeded(make, seed)


@CLAIM.comparison
def digits(seed: int) -> dict[str, float]:
    """Accuracy in percent of each side at its best rate."""
    data = kit_digits.load()
    x, y = data.train
    base = kit_digits.train(_mlp(seed), x.flip(3), y, steps=500, lr=1e-3, seed=seed)

    def head() -> nn.Module:
        model = copy.deepcopy(base).requires_grad_(False)
        model.get_submodule("head").requires_grad_(True)
        return model

    def adapted(slug: str, options: Mapping[str, Any]) -> nn.Module:
        config = tunesmith.adapter(slug, target_modules=BODY, modules_to_save=["head"], **options)
        return kit_digits.seeded(lambda: get_peft_model(copy.deepcopy(base), config), seed)

    sides: dict[str, Callable[[], nn.Module]] = {"head": head}
    for name, (slug, options) in SIDES.items():
        sides[name] = lambda slug=slug, options=options: adapted(slug, options)
    figures = {"before": kit_digits.accuracy(base, *data.test)}
    for name, make in sides.items():
        best, figures[f"{name}_rate"] = kit_digits.search(
            lambda lr, make=make: kit_digits.train(make(), x, y, steps=STEPS, lr=lr, seed=seed),
            RATES,
            lambda model: kit_digits.accuracy(model, *data.validation),
        )
        figures[name] = kit_digits.accuracy(best, *data.test)
        trained = [p.numel() for n, p in best.named_parameters() if p.requires_grad and "head" not in n]
        figures[f"{name}_trained"] = sum(trained)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    """On medians over the seeds."""
    more = figures.median("r32") - figures.median("head")
    return [Check("LoLDU of rank 32 - head alone, points", more, ">=", 1)]
