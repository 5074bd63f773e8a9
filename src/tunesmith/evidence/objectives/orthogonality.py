"""Orthogonality: the formula, its slope, what it is zero for, and that it counts once per step."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tunesmith.adapters.adalora import AdaLoRA
from tunesmith.core.seeds import generator
from tunesmith.evidence import kit_digits, kit_text
from tunesmith.evidence.claim import Check, Claim
from tunesmith.objectives.orthogonality import Orthogonality

CLAIM = Claim(
    "orthogonality",
    says="Adding |P^T P - I|_F^2 + |Q Q^T - I|_F^2 to the loss keeps the factors of AdaLoRA close to orthonormal, so "
    "that its lambda are close to singular values.",
    where="section 3.1",
    ran="The term on the factors of PEFT's LoRA and of AdaLoRA on a small Llama, against the formula in float64; "
    "gradient descent on the term alone; and AdaLoRA trained with the term named as a regulariser, or added by the "
    "adapter itself.",
)


def _ids(rows: int, seed: int = 0) -> Tensor:
    return torch.randint(kit_text.BYTES, (rows, 16), generator=generator(seed, "orthogonality ids"))


def _batch(rows: int, seed: int = 0) -> dict[str, Tensor]:
    ids = _ids(rows, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def _lora(rank: int = 4) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    config = LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    model = kit_digits.seeded(lambda: get_peft_model(kit_text.model(2, 0), config), 0)
    held = [m for m in model.modules() if hasattr(m, "lora_A")]
    return model, [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in held]


def _formula(A: Tensor, B: Tensor) -> Tensor:
    """By sums over pairs of components, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for rows in (A.double(), B.double().T):
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                total = total + ((one * other).sum() - float(i == j)) ** 2
    return total


@CLAIM.exact
def the_term_is_the_formula() -> list[Check]:
    """The term and its gradient are those of the formula, summed over the layers."""
    model, factors = _lora()
    loss, _ = Orthogonality()(model, _batch(2))
    loss.backward()
    other = sum(_formula(A.detach(), B.detach()) for A, B in factors)
    assert isinstance(other, Tensor)
    worst = 0.0
    for A, B in factors:
        assert A.grad is not None
        assert B.grad is not None
        for gradient, rows in ((A.grad, A.detach().double()), (B.grad.T, B.detach().double().T)):
            expected = 4 * (rows @ rows.T - torch.eye(len(rows))) @ rows
            worst = max(worst, float((gradient - expected).abs().max() / expected.abs().max()))
    return [
        Check("relative difference of the loss", float(abs(loss.detach() / other - 1)), "<=", 1e-6),
        Check("largest difference of a gradient, relative to its largest number", worst, "<=", 1e-6),
        Check("layers", len(factors), ">=", 10),
    ]


@CLAIM.exact
def it_makes_factors_orthonormal() -> list[Check]:
    """Gradient descent on the term alone ends where every component has length one and meets no other."""
    model, factors = _lora()
    optimizer = torch.optim.SGD([p for pair in factors for p in pair], lr=0.02)
    first = last = float("nan")
    for step in range(300):
        loss, _ = Orthogonality()(model, _batch(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        first, last = (float(loss.detach()) if not step else first), float(loss.detach())
    worst = max(
        float((f @ f.T - torch.eye(len(f))).abs().max()) for A, B in factors for f in (A.detach(), B.detach().T)
    )
    return [
        Check("the term before", first, ">=", 10),
        Check("the term after", last, "<=", 1e-6),
        Check("largest entry of F F^T - I", worst, "<=", 1e-4),
    ]


@CLAIM.exact
def once_per_step() -> list[Check]:
    """Ten steps of AdaLoRA with the term named, over one or three micro-batches, or added by the adapter: the same."""
    ends = []
    for own, pieces in ((0.3, 1), (0.3, 3), (0.0, 1), (0.0, 3)):
        config = tunesmith.adapter("adalora", init_rank=3, target_rank=2, orthogonality=own)
        model = kit_digits.seeded(lambda config=config: get_peft_model(kit_text.model(2, 0), config), 0)
        optimizer, term = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), Orthogonality()
        for step in range(10):
            whole = _batch(6, step)
            total = term.count(whole)
            with tunesmith.step(model.train(), step, 10):
                for rows in torch.arange(6).chunk(pieces):
                    piece = {name: value[rows] for name, value in whole.items()}
                    loss = model(**piece).loss / pieces
                    (loss if own else loss + 0.3 * term(model, piece, total)[0]).backward()
                optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for m in model.modules() if isinstance(m, AdaLoRA) for p in (m.A, m.B)])
    start = kit_digits.seeded(lambda: get_peft_model(kit_text.model(2, 0), config), 0)
    began = [p.detach() for m in start.modules() if isinstance(m, AdaLoRA) for p in (m.A, m.B)]
    apart = max(float((a - b).abs().max()) for end in ends[1:] for a, b in zip(ends[0], end, strict=True))
    moved = min(float((a - b).abs().max()) for a, b in zip(ends[0], began, strict=True))
    return [
        Check("largest difference of a factor", apart, "<=", 1e-6),
        Check("smallest largest move of a factor", moved, ">=", 1e-2),
    ]
