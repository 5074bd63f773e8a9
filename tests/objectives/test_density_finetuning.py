"""What is special to DEFT's density loss."""

from __future__ import annotations

import json
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import tunesmith
from tests.train.conftest import rows as letters
from tests.train.conftest import write_rows
from tests.zoo import DECODERS, FAMILIES, batch, tiny
from tunesmith import catalog
from tunesmith.core.meters import saved_bytes
from tunesmith.core.objective import ModelLoss
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.objectives.density_finetuning import DensityFinetuning, _Smooth
from tunesmith.objectives.intuitive_finetuning import IntuitiveFineTuning
from tunesmith.objectives.sft import SFT
from tunesmith.train import run

AFTER = {"llama": "act_fn", "qwen2": "act_fn", "gpt2": "mlp.act", "opt": "activation_fn", "vit": "activation_fn"}
AFTER |= {"bert": "intermediate_act_fn", "t5": "DenseReluDense.act"}
LENGTHS = (7, 3, 5)
SPAN = 9
Trainer = type("Trainer", (tunesmith.TrainerMixin, T.Trainer), {})


def model_of(family: str) -> nn.Module:
    """With activations of a size that matters, and of T5 with fewer layers in the decoder."""
    return tiny(family, **({"num_decoder_layers": 1} if family == "t5" else {"initializer_range": 0.3}))


def padded(family: str, lengths: tuple[int, ...] = LENGTHS) -> dict[str, Tensor]:
    """Rows of several lengths; the labels of an encoder-decoder are two shorter."""
    given = batch(family, rows=len(lengths), length=SPAN)
    if family == "vit":
        return given
    if family == "t5":
        given["labels"] = given["input_ids"][:, : SPAN - 2].clone()
    for row, length in enumerate(lengths):
        given["attention_mask"][row, length:] = 0
        if given["labels"].dim() == 2:
            given["labels"][row, length - (2 if family == "t5" else 0) :] = -100
    return given


@contextmanager
def outputs(model: nn.Module, family: str) -> Iterator[dict[str, list[Tensor]]]:
    """What the activation functions give, by side."""
    found: dict[str, list[Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(AFTER[family]):
            kept = found.setdefault("decoder" if family == "t5" and "decoder." in name else "encoder", [])
            handles.append(module.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out)))
    assert handles
    yield found
    for handle in handles:
        handle.remove()


def phi(a: Tensor, eps: float = 1e-7) -> Tensor:
    return a**2 / (a**2 + eps)


def per_row(values: Tensor, mask: Tensor) -> Tensor:
    """The mean over rows of the mean over the tokens of each."""
    return (values.view(mask.shape) * mask / mask.sum(1, keepdim=True) / len(mask)).sum()


def real(given: dict[str, Tensor], side: str) -> Tensor:
    """1 for each token that counts; a tiny ViT has 17."""
    return (given["labels"] != -100).long() if side == "decoder" else given.get("attention_mask", torch.ones(3, 17))


def reference(seen: dict[str, list[Tensor]], given: dict[str, Tensor], eps: float = 1e-7) -> Tensor:
    """The mean of a side's layers, the sum of the sides."""
    means = {s: [per_row(phi(a, eps).mean(-1), real(given, s)) for a in layers] for s, layers in seen.items()}
    return sum(sum(layers) / len(layers) for layers in means.values())


def watched(term: DensityFinetuning, model: nn.Module, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    with term.watching(model):
        model(**given)
    return term(model, given)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def lora(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family_it_is_the_formula(family: str) -> None:
    model, given, term = model_of(family).double(), padded(family), DensityFinetuning(eps=1e-3)
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    own, _ = term(model, given)
    with outputs(model, family) as seen:
        loss, _ = watched(term, model, given)
    expected = reference(seen, given, 1e-3)
    assert torch.allclose(loss, expected, rtol=1e-9)
    weights, how = list(model.parameters()), {"allow_unused": True, "retain_graph": True, "materialize_grads": True}
    slopes = [torch.autograd.grad(x, weights, **how) for x in (own, loss, expected)]
    for a, b, c in zip(*slopes, strict=True):
        assert torch.allclose(torch.stack([a, b]), c, atol=1e-12)
    assert int(term.count(given)) == len(LENGTHS)
    assert torch.allclose(term(model, given, torch.tensor(12))[0], expected * 3 / 12, rtol=1e-9)


@pytest.mark.parametrize("family", ["opt", "t5", "vit"])
def test_reported_densities_are_counts(family: str) -> None:
    model, given = model_of(family), padded(family)
    with outputs(model, family) as seen:
        _, figures = watched(DensityFinetuning(tau=0.1), model, given)
    for side, layers in seen.items():
        kept = [a.flatten(0, -2)[real(given, side).flatten() != 0].abs() for a in layers]
        for name, bound in (("density", 0.0), ("density_above_tau", 0.1)):
            expected = sum(int((a > bound).sum()) / a.numel() for a in kept) / len(kept)
            assert float(figures[f"{side}_{name}" if family == "t5" else name]) == pytest.approx(expected, abs=1e-6)
            assert 0 < expected < 1 or (family, name) == ("vit", "density")  # GELU is never zero here
    assert [value.requires_grad for value in figures.values()] == [False] * (5 if family == "t5" else 3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("eps", [1e-30, 1e-7, 1.0])
def test_value_and_slope_are_taken_in_float32_and_zero_has_none(eps: float, dtype: torch.dtype) -> None:
    a = torch.tensor([0.0, -0.0, 1e-4, 3e-4, 1e-3, 0.3, 10.0], dtype=dtype)[:, None].requires_grad_()
    wide = a.detach().double().requires_grad_()
    with saved_bytes() as kept:
        value = _Smooth.apply(a * 1, eps)
    assert (value.dtype, kept.bytes) == (torch.float32, a.numel() * a.element_size())
    expected = phi(wide, eps)[:, 0]
    assert torch.allclose(value.double(), expected, rtol=1e-5)
    slope, other = (torch.autograd.grad(v.sum(), x)[0] for v, x in ((value, a), (expected, wide)))
    assert slope.dtype == dtype
    assert torch.allclose(slope.double(), other, rtol=1e-2, atol=1e-6)
    assert value[:2].tolist() == slope[:2, 0].tolist() == [0, 0]


@pytest.mark.parametrize("family", ["opt", "bert", "t5"])
def test_padding_counts_only_if_asked(family: str) -> None:
    model, given = model_of(family), padded(family)
    with outputs(model, family) as seen:
        counted, _ = watched(DensityFinetuning(padding=True), model, given)
    every = sum(sum(phi(a).mean() for a in layers) / len(layers) for layers in seen.values())
    assert torch.allclose(counted, every, atol=1e-6)
    assert not torch.allclose(counted, DensityFinetuning()(model, given)[0], atol=1e-4)


def test_the_decoder_counts_by_its_own_mask() -> None:
    model, given, term = model_of("t5"), padded("t5"), DensityFinetuning()
    mask = (given["labels"] != -100).long().cumsum(1).lt(3).long()
    with outputs(model, "t5") as seen:
        loss, _ = watched(term, model, {**given, "decoder_attention_mask": mask})
    decoder = [per_row(phi(a).mean(-1), mask) for a in seen.pop("decoder")]
    assert torch.allclose(loss, reference(seen, given) + sum(decoder), atol=1e-6)


def test_rows_of_padding_do_not_count() -> None:
    model, given, term = model_of("opt"), padded("opt"), DensityFinetuning()
    expected, _ = term(model, given)
    more = {k: torch.cat([v, v[:1]]) for k, v in given.items()}
    more["attention_mask"][-1] = 0
    assert int(term.count(more)) == len(LENGTHS)
    assert torch.allclose(term(model, more)[0], expected, atol=1e-6)
    more["attention_mask"][:] = 0
    loss, figures = term(model, more)
    assert not any(float(value.detach()) for value in (loss, *figures.values()))


@pytest.mark.parametrize("kind", ["dept", "peft"])
def test_virtual_tokens_do_not_count(kind: str) -> None:
    given, own = padded("opt"), tunesmith.adapter("dept", num_virtual_tokens=4, rank=2)
    config = own if kind == "dept" else PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(model_of("opt"), config).eval()
    with outputs(model, "opt") as seen:
        loss, _ = watched(DensityFinetuning(), model, given)
    cut = [a.view(len(LENGTHS), SPAN + 4, -1)[:, 4:] for a in seen["encoder"]]
    assert torch.allclose(loss, reference({"encoder": cut}, given), atol=1e-6)
    loss.backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)


def test_a_watched_pass_is_the_only_one() -> None:
    model, given, term = model_of("opt"), padded("opt"), DensityFinetuning()
    count: list[Any] = []
    model.register_forward_hook(lambda *_: count.append(1))
    before = hooks(model)
    with term.watching(model):
        assert hooks(model) > before
        model(**given)
    assert hooks(model) == before
    term(model, given)
    assert len(count) == 1
    term(model, given)  # nothing of the first pass is left
    assert len(count) == 2
    assert hooks(model) == before


@pytest.mark.parametrize("where", ["training", "evaluation", "no gradients"])
def test_activations_are_let_go(where: str) -> None:
    model, given, term = model_of("opt").train(where == "training"), padded("opt"), DensityFinetuning()
    expected, graph = term(model, given)[0].detach(), where != "no gradients"
    held: list[weakref.ref] = []
    for module in model.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda m, args, out: held.append(weakref.ref(out)))
    with torch.set_grad_enabled(graph):
        for _ in range(3):
            with term.watching(model):
                model(**given)
            # Without gradients the figures per token are enough.
            assert sum(ref() is not None for ref in held) == (2 if graph else 0)
            assert torch.equal(term(model, given)[0].detach(), expected)
            assert not any(ref() is not None for ref in held)
    assert len(held) == 6


def test_after_an_exception_nothing_is_left() -> None:
    model, given, term = model_of("opt"), padded("opt"), DensityFinetuning()
    before = hooks(model)
    with pytest.raises(ZeroDivisionError), term.watching(model):
        1 / (len(model(**given).logits) - len(LENGTHS))
    assert (hooks(model), term._seen) == (before, None)
    head = model.lm_head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        term(model, given)
    head.remove()
    assert (hooks(model), term._seen) == (before, None)


def test_beside_an_objective_of_two_passes_only_the_last_counts() -> None:
    model, given, term = model_of("llama"), padded("llama"), DensityFinetuning()
    with outputs(model, "llama") as seen, term.watching(model):
        IntuitiveFineTuning()(model, given)
    assert len(seen["encoder"]) == 4
    last = {"encoder": seen["encoder"][2:]}
    assert torch.allclose(term(model, given)[0], reference(last, given), atol=1e-6)


def gradients(model: nn.Module, given: dict[str, Tensor], inside: bool = False) -> dict[str, Tensor]:
    """Of loss + density; `inside` runs the backward pass, and with it what is recomputed, under the hooks too."""
    term = DensityFinetuning(eps=1e-3)
    with term.watching(model):
        loss = model(**given).loss
        if inside:
            (loss + term(model, given)[0]).backward()
    if not inside:
        (loss + term(model, given)[0]).backward()
    assert term._seen is None
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_under_gradient_checkpointing(family: str, inside: bool) -> None:
    given = padded(family)
    plain, checkpointed = model_of(family).train(), model_of(family).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    expected, found = gradients(plain, given), gradients(checkpointed, given, inside)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[n], found[n], atol=1e-5, rtol=1e-4) for n in expected)


def test_blocks_that_run_without_gradients_are_refused() -> None:
    model, given = model_of("llama").train(), padded("llama")
    model.activation_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    term = DensityFinetuning()
    with pytest.raises(ModelError, match="use_reentrant"), term.watching(model):
        model(**given)
    assert term._seen is None
    with torch.no_grad():
        assert bool(term(model, given)[0].isfinite())


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_learns_to_be_sparse_and_the_base_stays(family: str) -> None:
    given, term, ends = padded(family), DensityFinetuning(eps=1e-2), []
    for weight in (0.0, 5.0):
        model = lora(model_of(family))
        start = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for _ in range(20):
            with term.watching(model):
                loss = model(**given).loss
            density, _ = term(model, given)
            (loss + weight * density).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start)
        ends.append(float(density.detach()))
    assert ends[1] < ends[0] - 0.05


@pytest.mark.parametrize("family", FAMILIES)
def test_in_a_trainer_accumulation_is_one_large_batch(family: str, tmp_path: Path) -> None:
    given, objective = padded(family, (7, 3, 5, 6)), SFT() if family in DECODERS else ModelLoss()
    data = [{k: v[i] for k, v in given.items()} for i in range(4)]
    named = {"output_dir": str(tmp_path), "max_steps": 1, "learning_rate": 0.1, "optim": "sgd", "max_grad_norm": 0.0}
    named |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    wanted, term = lora(model_of(family)), DensityFinetuning(eps=1e-2)
    trained = [p for p in wanted.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(objective(wanted, given)[0] + 0.5 * term(wanted, given)[0], trained)
    for size in (4, 2, 1):
        model = lora(model_of(family))
        count: list[Any] = []
        model.register_forward_hook(lambda *_, count=count: count.append(1))
        rows = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        args = T.TrainingArguments(**named, **rows, lr_scheduler_type="constant", remove_unused_columns=False)
        made = Trainer(model=model, args=args, train_dataset=data, objective=objective, regularisers=[(term, 0.5)])
        made.train()
        assert len(count) == 4 // size
        assert "density_smooth" in made.state.log_history[0]
        after = [p.detach() for p in model.parameters() if p.requires_grad]
        for new, old, slope in zip(after, trained, slopes, strict=True):
            assert torch.allclose(new, old - 0.1 * slope, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"train.gradient_checkpointing": True}, {"optimizer": "mezo"}])
def test_in_a_recipe(changes: dict[str, Any], tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", letters(24))
    term = {"name": "density-finetuning", "weight": 1.0, "tau": 1e-2}
    fields: dict[str, Any] = {"model": "tiny-lm-s", "data.train": str(data), "output": str(tmp_path / "run")}
    fields |= {"adapters": ["lora"], "regularisers": [term]}
    fields |= {"train.steps": 4, "train.batch_size": 4, "train.max_grad_norm": 0.0, "report.generate_rows": 0}
    assert "density-finetuning" in run(None, **fields, **changes).title
    history = json.loads((tmp_path / "run" / "report.json").read_text())["details"]["history"]
    logged = [entry for entry in history if "density_smooth" in entry]
    assert logged
    assert all(0 < entry["density_above_tau"] <= entry["density"] <= 1 for entry in logged)


class Strange(nn.ModuleDict):
    """Stacks of blocks, run one after the other on ones."""

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = torch.ones(*input_ids.shape, 4)
        for block in (block for stack in self.values() for block in stack):
            x = block(x)
        return x


def stack(**inside: nn.Module) -> nn.ModuleList:
    return nn.ModuleList([nn.Sequential(OrderedDict(first=nn.Linear(4, 4), **inside))])


def test_activations_of_attention_and_adapters_are_left_out() -> None:
    low = nn.Linear(4, 4)
    nn.init.constant_(low.weight, -1.0)
    made = stack(self_attn=nn.Sigmoid(), tunesmith_adapter=nn.Sigmoid(), up_proj=low, act=nn.ReLU())
    _, figures = DensityFinetuning()(Strange({"layers": made}), {"input_ids": torch.ones(2, 3, dtype=torch.long)})
    assert float(figures["density"]) == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Strange({"layers": stack(drop=nn.Dropout(), soft=nn.Softmax(-1))}),
            "no activation functions that are",
        ),
        (Strange({"a": stack(x=nn.ReLU()), "b": stack(x=nn.ReLU())}), r"several stacks of blocks \(a, b\)"),
        (tiny("bert", chunk_size_feed_forward=3), r"bert.encoder.layer gives 9 vectors for a batch of 3 x 9 tokens"),
    ],
)
def test_models_that_are_not_understood(model: nn.Module, message: str) -> None:
    term = DensityFinetuning()
    with pytest.raises(ModelError, match=message):
        term(model, padded("bert"))
    assert term._seen is None


def test_a_prepared_mask_is_refused() -> None:
    given = padded("llama")
    prepared = {**given, "attention_mask": torch.zeros(3, 1, SPAN, SPAN)}
    with pytest.raises(DataError, match=r"attention_mask has the shape \(3, 1, 9, 9\); expected \(rows, tokens\)"):
        DensityFinetuning().count(prepared)
    assert int(DensityFinetuning(padding=True).count(prepared)) == 3


@pytest.mark.parametrize("option", [{"eps": 0.0}, {"eps": -1e-7}, {"tau": -0.1}, {"padding": "often"}])
def test_options_are_checked(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(option))):
        catalog.get("density-finetuning").validate(option)
