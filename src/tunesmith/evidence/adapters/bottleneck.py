"""Bottlenecks and prefixes: counts, the start, and attention over concatenated keys, exactly."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tunesmith
from tunesmith.adapters.bottleneck import Bottleneck
from tunesmith.core.attend import plug, plugged_attention
from tunesmith.core.layer import describe
from tunesmith.core.seeds import forked, generator
from tunesmith.evidence.claim import Check, Claim

CLAIM = Claim(
    "bottleneck",
    says="Serial adapters, parallel adapters and prefixes can be put together in any sizes and layers; an active layer "
    "trains 2 x width x size numbers for each.",
    where="section 2",
    ran="Identities on a small Llama with grouped keys (4 blocks, width 32, keys of 16) and on one attention by hand. "
    "What combinations of the modules are worth is searched by `autopeft`.",
)
WIDTH, KEYS = 32, 16
CONFIGURATIONS: list[dict[str, Any]] = [
    {"serial": s, "parallel": p, "prefix": n, "layers": layers}
    for s, p, n in ((8, 0, 0), (0, 8, 0), (0, 0, 4), (1, 32, 2), (16, 4, 1))
    for layers in (None, [0], [1, 3])
]


def _llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    with forked("bottleneck"):
        return LlamaForCausalLM(config).eval()


def _ids() -> Tensor:
    return torch.randint(64, (2, 9), generator=generator("ids"))


@CLAIM.exact
def counts() -> list[Check]:
    """Every configuration trains what the formula says and no more, and each of its tensors has a gradient."""
    wrong = without = 0
    for options in CONFIGURATIONS:
        model = get_peft_model(_llama(), tunesmith.adapter("bottleneck", **options))
        active = 4 if options["layers"] is None else len(options["layers"])
        narrow = sum(2 * WIDTH * size + size + WIDTH for size in (options["serial"], options["parallel"]) if size)
        wrong += model.get_nb_trainable_parameters()[0] != active * (narrow + 2 * KEYS * options["prefix"])
        _move(model)
        for name, p in model.named_parameters():
            if name.endswith("down.bias"):
                p.data.fill_(5.0)  # a ReLU that no token passes has no gradient, and a bottleneck of 1 has but one
        model(input_ids=_ids(), labels=_ids()).loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        without += sum(p.grad is None or not bool(p.grad.any()) for p in trained)
    return [
        Check("configurations of 15 with another count", wrong, "==", 0),
        Check("tensors without a gradient", without, "==", 0),
    ]


def _move(model: nn.Module) -> None:
    g = generator("move")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=g))


@CLAIM.exact
@torch.no_grad()
def start() -> list[Check]:
    """Bottlenecks start as the identity; a prefix moves the output from the start, by its share of the softmax."""
    expected = _llama()(input_ids=_ids()).logits
    found = {}
    for name, options in {"none": {"serial": 8, "parallel": 8}, "prefix": {"serial": 0, "prefix": 4}}.items():
        model = get_peft_model(_llama(), tunesmith.adapter("bottleneck", **options)).eval()
        found[name] = float((model(input_ids=_ids()).logits - expected).abs().max() / expected.std())
    return [
        Check("largest change of a logit by new bottlenecks, standard deviations", found["none"], "<=", 1e-5),
        Check("largest change by a new prefix of 4", found["prefix"], ">=", 1e-3),
    ]


@CLAIM.exact
@torch.no_grad()
def modules() -> list[Check]:
    """The feed-forward gives f + U relu(D f) + 4 U' relu(D' x) by hand; nothing of it stands in a block left out."""
    model = get_peft_model(_llama(), tunesmith.adapter("bottleneck", serial=8, parallel=6, layers=[1, 3])).eval()
    _move(model)
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    feeds = [block.mlp for block in model.get_base_model().model.layers]
    for i, mlp in enumerate(feeds):
        mlp.register_forward_hook(lambda module, given, out, i=i: seen.__setitem__(i, (given[0], out)))
    model(input_ids=_ids())
    worst = [0.0, 0.0]
    for i, mlp in enumerate(feeds):
        x, out = seen[i]
        f = F.linear(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x), mlp.down_proj.base_layer.weight)
        held, expected = mlp.down_proj.tunesmith_adapters["default"][0], f
        for narrow, read, scale in ((held.serial, f, 1.0), (held.parallel, x, 4.0)) if i % 2 else ():
            hidden = F.relu(read @ narrow.down.weight.T + narrow.down.bias)
            expected = expected + scale * (hidden @ narrow.up.weight.T + narrow.up.bias)
        worst[i % 2] = max(worst[i % 2], float((out - expected).abs().max()))
    return [
        Check("largest difference in blocks with modules", worst[1], "<=", 1e-5),
        Check("largest difference in blocks without", worst[0], "<=", 1e-5),
    ]


@CLAIM.exact
@torch.no_grad()
def prefix() -> Check:
    """A prefix is attention over the concatenation of its keys and values with the layer's own, by hand."""
    heads, groups, dim, length, rows = 4, 2, 8, 5, 7
    g = generator("prefix")
    made = Bottleneck(describe(nn.Linear(48, groups * dim), "model.layers.0.mlp.down_proj"), serial=0, prefix=length)
    made.prefix.copy_(torch.randn(made.prefix.shape, generator=g))
    query = torch.randn(2, heads, rows, dim, generator=g)
    key, value = torch.randn(2, 2, groups, rows, dim, generator=g)
    mask = torch.full((2, 1, rows, rows), torch.finfo(torch.float32).min).triu(1)
    attention = nn.Module()
    plug(attention, made)
    found, _ = plugged_attention(attention, query, key, value, mask)
    worst = 0.0
    for row in range(2):
        for head in range(heads):
            at = slice(dim * (head // 2), dim * (head // 2) + dim)
            k = torch.cat([made.prefix[0, :, at], key[row, head // 2]])
            v = torch.cat([made.prefix[1, :, at], value[row, head // 2]])
            for i in range(rows):
                seen = length + i + 1
                p = (k[:seen] @ query[row, head, i] / dim**0.5).softmax(0)
                worst = max(worst, float((p @ v[:seen] - found[row, i, head]).abs().max()))
    return Check("largest difference of an output", worst, "<=", 1e-5)
