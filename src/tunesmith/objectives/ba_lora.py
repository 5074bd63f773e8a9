"""BA-LoRA: three terms on the logits that keep fine-tuning near the original model, diverse and of low rank.

Chang, Chang and Wu, "BA-LoRA: Bias-Alleviating Low-Rank Adaptation to Mitigate Catastrophic Inheritance in Large
Language Models", ICLR 2026 (`version="iclr"`) and arXiv 2024 (`version="v1"`). Z_F and Z_P are the logits of the tuned
and of the original model, with a row per picture or text (classification) or per labelled token (generation), D wide.

    L = task + lambda1 CR + lambda2 DR + lambda3 SVDR
                      iclr                                          v1
    classification    CR = T^2 KL(softmax(Z_P/T) || softmax(Z_F/T)) CR = MSE(Z_F/|Z_F|, Z_P/|Z_P|), row by row
                      DR = 1/D sum_(i != j) cov(Z_F)_ij^2           the same
                      SVDR = -sum_(i<=k) sigma_i / sum_i sigma_i    the same
    generation        CR = T^2 KL, mean over the tokens             CR = KL(p_P || p_F), sum over the tokens
                      DR = -entropy of the K largest, renormalised  DR = -entropy
                      SVDR = -sum_(i<=k) sigma_i / |Z_F|_Frobenius  SVDR as above, of (rows, tokens D)

T = 2, K = 20 and two power iterations are the released script's for Llama-2-7B. It also moves the weights over a run
(lambda1 falls to a tenth; the others are 0 for the first fifth); an objective does not know its step, so here they are
constant.

Where we differ from released code: tokens that no label is predicted from count nowhere (v1 has no mask; iclr takes the
logits at a label instead of those that predict it); each row of a batch counts the same and has a spectrum of its own,
so that a step does not depend on how its batch is cut (`pool="batch"` is the released form); u_i and v_i are constants
in sigma_i = u_i^T Z v_i, the same slope without going backward through an SVD. In v1's code the last term raises an
IndexError, and its SVD is taken without gradients. With k >= min(rows, D) the ratio of classification is always 1.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn

from tunesmith.core.loss import IGNORED, labelled, model_inputs, targets_of
from tunesmith.core.objective import Batch, Objective
from tunesmith.core.packing import BOUNDS, segments
from tunesmith.core.part import part
from tunesmith.core.reference import reference
from tunesmith.core.seeds import forked, subset
from tunesmith.errors import DataError, ModelError

OVERSAMPLING = 5
_ALIGNED = ("ForTokenClassification", "ForMaskedLM")


class Form(NamedTuple):
    """The paper's values for one kind of task."""

    lambda1: float
    lambda2: float
    lambda3: float
    k: int


FORMS: Mapping[tuple[str, str], Form] = {
    ("iclr", "classification"): Form(0.15, 0.03, 0.03, 5),
    ("iclr", "generation"): Form(0.025, 0.005, 0.005, 10),
    ("v1", "classification"): Form(1e-4, 3e-4, 1e-4, 3),
    ("v1", "generation"): Form(1e-4, 3e-4, 1e-4, 3),
}


class _Tokens(NamedTuple):
    """The n labelled tokens of a batch in reading order: group (rows without any left out), logits' row and column."""

    group: Tensor
    at: Tensor
    column: Tensor
    label: Tensor


@part(
    paper="arXiv:2408.04556",
    tags=("regulariser",),
    refuses={
        "full-finetuning": "it compares with the model before tuning, which is the base below an adapter; when all "
        "weights train, a resumed run has lost it"
    },
)
class BALoRA(Objective):
    """Consistency with the original model, diversity and a concentrated spectrum of the logits.

    With one label per row the terms are those of classification, with one per token those of generation. The original
    is the model with its adapters switched off (a new head included, so that the base's own head answers); of a model
    without adapters it is a frozen copy, made at the first call.

    Args:
        version: The forms and weights of the `iclr` paper or of the first preprint, `v1`.
        lambda1: Weight of consistency; the paper's for the form if None. 0 spares the original's forward pass.
        lambda2: Weight of diversity.
        lambda3: Weight of the spectrum.
        k: Singular values that are to hold the spectrum; the paper's for the form if None (3, 5 or 10).
        temperature: T of iclr's consistency.
        top_k: K of iclr's entropy of generation.
        pool: `row`: each row has means and a spectrum of its own. `batch`: one of all tokens of a micro-batch.
        iterations: Of the randomised SVD of generation (iclr); 0 takes the exact one.
        svd_tokens: Most tokens of one spectrum; of more, so many are drawn.
        seed: Of the randomised SVD and of the draw.
    """

    def __init__(
        self,
        *,
        version: Literal["iclr", "v1"] = "iclr",
        lambda1: NonNegativeFloat | None = None,
        lambda2: NonNegativeFloat | None = None,
        lambda3: NonNegativeFloat | None = None,
        k: PositiveInt | None = None,
        temperature: PositiveFloat = 2.0,
        top_k: PositiveInt = 20,
        pool: Literal["row", "batch"] = "row",
        iterations: NonNegativeInt = 2,
        svd_tokens: PositiveInt = 1024,
        seed: int = 0,
    ) -> None:
        self.version = version
        self.given: dict[str, Any] = {"lambda1": lambda1, "lambda2": lambda2, "lambda3": lambda3, "k": k}
        self.temperature, self.top_k, self.pool = temperature, top_k, pool
        self.iterations, self.svd_tokens, self.seed = iterations, svd_tokens, seed
        self._seen: tuple[tuple, dict[str, Any], Tensor] | None = None
        self._copies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()

    def form(self, batch: Batch) -> tuple[str, Form]:
        """The kind of task of a batch, with the weights and k in force.

        Raises:
            DataError: no labels, or labels that are not classes.
        """
        labels = batch.get("labels")
        if labels is None or labels.is_floating_point() or labels.dim() not in (1, 2):
            found = "none" if labels is None else f"{labels.dtype} of shape {tuple(labels.shape)}"
            raise DataError(
                f"ba-lora compares distributions over classes or tokens: expected labels of integers, (rows,) or (rows,"
                f" tokens); found {found}. Leave it out of regression and multi-label tasks"
            )
        kind = "classification" if labels.dim() == 1 else "generation"
        return kind, FORMS[self.version, kind]._replace(**{n: v for n, v in self.given.items() if v is not None})

    def count(self, batch: Batch) -> Tensor:
        """The number of rows with labels, ()."""
        self.form(batch)
        marked = batch["labels"] != IGNORED
        if BOUNDS in batch:
            return torch.tensor(segments(batch)[marked].unique().numel(), device=marked.device)
        return marked.view(len(marked), -1).any(1).sum()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Keep the inputs and logits of the last forward pass inside the block.

        Raises:
            ModelError: in the pass, that the model gives no logits.
        """
        self._keep_original(model)
        self._seen = None

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
            if not isinstance(getattr(out, "logits", None), Tensor):
                raise ModelError(f"ba-lora: {type(module).__name__} gives {type(out).__name__}, which has no `logits`")
            self._seen = args, kwargs, out.logits

        handle = model.register_forward_hook(keep, with_kwargs=True)
        try:
            yield
        except BaseException:
            self._seen = None
            raise
        finally:
            handle.remove()

    def __call__(self, model: nn.Module, batch: Batch, total: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """The three terms of one micro-batch, from the pass that was watched or from one of its own.

        Returns:
            The loss, () float32; `ba_consistency`, `ba_diversity` and `ba_spectrum`, the terms before their weights, as
            means over the rows of the micro-batch. Terms of weight 0 are not computed.

        Raises:
            DataError: labels of which there are no distributions.
            ModelError: logits that do not belong to the labels; or an adapter below which the base is another.
        """
        kind, form = self.form(batch)
        base = getattr(model, "module", model)
        both = bool(getattr(getattr(base, "config", None), "is_encoder_decoder", False))
        original = base.get_base_model() if isinstance(base, PeftModel) else base
        shifted = kind == "generation" and not both and not type(original).__name__.endswith(_ALIGNED)
        if self._seen is None:
            with self.watching(model):
                labelled(model, batch) if shifted else model(**(batch if both else model_inputs(batch)))
        assert self._seen is not None
        (args, given, logits), self._seen = self._seen, None
        keep, given = given.get("logits_to_keep"), given if both else model_inputs(given)
        tokens = _tokens(batch, shifted) if kind == "generation" else None
        Z, P = _chosen(logits, tokens, batch, keep), None
        if form.lambda1 and len(Z):
            P = _chosen(self._original(model, args, given), tokens, batch, keep).to(Z)
        with torch.autocast(Z.device.type, enabled=False):
            if not len(Z):
                terms = {}
            elif tokens is None:
                terms = self._classification(Z, P, form)
            else:
                terms = self._generation(Z, P, form, tokens)
        weights = {"consistency": form.lambda1, "diversity": form.lambda2, "spectrum": form.lambda3}
        loss = sum((weights[name] * value for name, value in terms.items()), 0 * Z[:1].sum())
        own = self.share(batch, None)
        return loss / self.share(batch, total), {f"ba_{name}": value.detach() / own for name, value in terms.items()}

    def _classification(self, Z: Tensor, P: Tensor | None, form: Form) -> dict[str, Tensor]:
        """Each term times the rows."""
        rows, classes = Z.shape
        terms: dict[str, Tensor] = {}
        if P is not None and self.version == "v1":
            terms["consistency"] = rows * F.mse_loss(F.normalize(Z, dim=-1), F.normalize(P, dim=-1))
        elif P is not None:
            terms["consistency"] = _divergence(Z, P, self.temperature).sum()
        if form.lambda2:
            # One row has no covariance.
            centred = Z - Z.mean(0)
            cov = centred.T @ centred / max(rows - 1, 1)
            terms["diversity"] = rows * (cov.square().sum() - cov.diagonal().square().sum()) / classes
        if form.lambda3:
            terms["spectrum"] = -rows * self._concentration(Z, form.k, frobenius=False)
        return terms

    def _generation(self, Z: Tensor, P: Tensor | None, form: Form, tokens: _Tokens) -> dict[str, Tensor]:
        """Each term as a sum over rows."""
        later, rows, weight, group = self.version == "iclr", int(tokens.group.max()) + 1, 1, tokens.group
        of_row = [(group == row).nonzero()[:, 0] for row in range(rows)]
        if self.pool == "batch":
            group, weight = torch.zeros_like(group), rows
        share = weight / group.bincount().to(Z.dtype)[group]
        terms: dict[str, Tensor] = {}
        if P is not None:
            each = _divergence(Z, P, self.temperature if later else 1.0)
            terms["consistency"] = (each * share).sum() if later else each.sum()
        if form.lambda2:
            log_p = (Z.topk(min(self.top_k, Z.shape[1])).values if later else Z).log_softmax(-1)
            terms["diversity"] = ((log_p.exp() * log_p).sum(-1) * share).sum()
        if form.lambda3 and later:
            parts = of_row if self.pool == "row" else [torch.arange(len(Z), device=Z.device)]
            parts = [at[self._drawn(len(at), int(tokens.label[at].sum()))] for at in parts]
            ratios = [self._concentration(Z[at], form.k, frobenius=True) for at in parts]
            terms["spectrum"] = -weight * torch.stack(ratios).sum()
        elif form.lambda3:
            wide = nn.utils.rnn.pad_sequence([Z[at] for at in of_row], batch_first=True)
            wide = wide[:, self._drawn(wide.shape[1], int(tokens.label.sum()))].flatten(1)
            terms["spectrum"] = -rows * self._concentration(wide, form.k, frobenius=False)
        return terms

    def _drawn(self, n: int, content: int) -> list[int]:
        """At most `svd_tokens` of n tokens; which depends on their labels alone."""
        return subset(n, min(n, self.svd_tokens), self.seed, "ba-lora tokens", content)

    def _concentration(self, Z: Tensor, k: int, *, frobenius: bool) -> Tensor:
        """The sum of the k largest singular values over the Frobenius norm or over the sum of all, ()."""
        if not bool(Z.isfinite().all()):
            return Z.sum() * float("nan")  # the trainer says that training diverged; an SVD would say less
        k = min(k, *Z.shape)
        with torch.no_grad():
            if frobenius and self.iterations and k + OVERSAMPLING < min(Z.shape):
                with forked(self.seed, "ba-lora", device=Z.device):
                    U, S, V = torch.svd_lowrank(Z, q=k + OVERSAMPLING, niter=self.iterations)
            else:
                U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
                V = Vh.T
            # Directions of singular values that are rounding alone would be a slope that is not there.
            U = U * (S / S[0] > max(Z.shape) * torch.finfo(Z.dtype).eps)
        sigma = (U * (Z @ V)).sum(0)
        whole = torch.linalg.matrix_norm(Z) if frobenius else sigma.sum()
        return sigma[:k].sum() / whole.clamp_min(torch.finfo(Z.dtype).tiny)

    def _keep_original(self, model: nn.Module) -> None:
        inner = getattr(model, "module", model)
        if self.given["lambda1"] == 0 or isinstance(inner, PeftModel) or inner in self._copies:
            return
        made = copy.deepcopy(inner).eval().requires_grad_(False)
        for module in made.modules():
            for hooks in (module._forward_hooks, module._forward_pre_hooks):
                # Other terms that watch this pass do so by closures; the model's own hooks are none.
                for key in [key for key, hook in hooks.items() if getattr(hook, "__closure__", None)]:
                    del hooks[key]
        self._copies[inner] = made

    def _original(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The logits of the original model for the same inputs."""
        inner = getattr(model, "module", model)
        if not isinstance(inner, PeftModel):
            with torch.no_grad():
                return self._copies[inner](*args, **kwargs).logits
        frozen = [p for p in inner.parameters() if not p.requires_grad]
        try:
            with reference(model) as original:
                return original(*args, **kwargs).logits
        finally:
            # PEFT lets all of an adapter train when it is switched on again, also what a schedule keeps still.
            for p in frozen:
                p.requires_grad_(False)


def _divergence(Z: Tensor, P: Tensor, T: float) -> Tensor:
    """T^2 KL(softmax(P / T) || softmax(Z / T)) of each row, (n,)."""
    log_q, log_p = ((logits / T).log_softmax(-1) for logits in (Z, P))
    return T**2 * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def _tokens(batch: Batch, shifted: bool) -> _Tokens:
    targets = labels = batch["labels"]
    row = torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)
    if shifted:
        row, targets = segments(batch), targets_of(batch)
    at, column = (targets != IGNORED).nonzero(as_tuple=True)
    return _Tokens(row[at, column].unique(return_inverse=True)[1], at, column, targets[at, column])


def _chosen(logits: Tensor, tokens: _Tokens | None, batch: Batch, keep: Any) -> Tensor:
    """The logits that count, (n, D) in float32 or wider, of rows or of tokens.

    Args:
        logits: (rows, D), or (rows, T', D) of which a causal model may have computed only the columns `keep`.
        tokens: None for rows.
        batch: What was run.
        keep: The argument `logits_to_keep` of the run.
    """
    labels = batch["labels"]
    wide = torch.promote_types(logits.dtype, torch.float32)
    if tokens is None:
        if logits.dim() == 2 and len(logits) == len(labels) and logits.shape[1] > 1:
            return logits[labels != IGNORED].to(wide)
    elif logits.dim() == 3 and len(logits) == len(labels):
        column = tokens.column
        if isinstance(keep, Tensor) and len(keep) == logits.shape[1]:
            place = column.new_full((labels.shape[1],), -1)
            place[keep] = torch.arange(len(keep), device=column.device)
            column = place[column]
        else:  # all of them, the last of them, or virtual tokens before them
            column = column + logits.shape[1] - labels.shape[1]
        if not bool((column < 0).any()):
            return logits[tokens.at, column].to(wide)
    raise ModelError(
        f"ba-lora: logits of shape {tuple(logits.shape)} do not belong to labels of shape {tuple(labels.shape)}; "
        "expected two classes or more for each row, or a vocabulary for each labelled token"
    )
