"""Fresh top: what begins anew and how, what stays, what a checkpoint brings; the frozen bottom beside it."""

from __future__ import annotations

import copy
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from tunesmith.evidence.claim import Check, Claim
from tunesmith.schedules.fresh_top import FreshTop
from tunesmith.schedules.telly import Telly

BLOCKS, WIDTH = 4, 128

CLAIM = Claim(
    "fresh-top",
    says="Beginning the top layers anew is the stabiliser for the smallest data sets, such as the similarity of "
    "sentences from 64 rows; freezing the bottom layers is the one for base-sized models.",
    where="abstract; layer-specific section",
    ran="What begins anew and what does not, exactly, for a BERT and a GPT-2 of 4 blocks, 128 wide, saved and "
    "loaded with weights far from any start: spreads, bits of the rest, a run that goes on, the bottom that rests. "
    "Runs that fail, with and without, are in the claim of stable-finetuning.",
)


def _loaded(kind: str = "bert") -> PreTrainedModel:
    """As a user gets it: from a folder, which leaves transformers' marks on every tensor."""
    bert = BertConfig(
        vocab_size=40, hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=2, intermediate_size=256
    )
    gpt2 = GPT2Config(vocab_size=40, n_embd=WIDTH, n_layer=BLOCKS, n_head=2, n_positions=16)
    made: PreTrainedModel = BertForSequenceClassification(bert) if kind == "bert" else GPT2LMHeadModel(gpt2)
    with torch.no_grad():
        for p in made.parameters():
            p.fill_(0.3)
    with TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        return type(made).from_pretrained(folder)


def _attached(model: nn.Module, state: dict[str, Tensor] | None = None, **options: Any) -> FreshTop:
    schedule = FreshTop(**options)
    if state is not None:
        schedule.restore(state)
    schedule.attach(model, torch.optim.AdamW(model.parameters()))
    schedule.begin_step(0)
    return schedule


def _changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@CLAIM.exact
def what_begins_anew() -> list[Check]:
    """The top r blocks and the pooler have the spread of the model's own start; every other bit stays."""
    worst, wrong, moved = 0.0, 0, 0
    for kind, r in (("bert", 1), ("bert", 3), ("gpt2", 2)):
        model = _loaded(kind)
        before = copy.deepcopy(model.state_dict())
        schedule = _attached(model, blocks=r, frozen=None)
        words = [f".layer.{i}." if kind == "bert" else f".h.{i}." for i in range(BLOCKS - r, BLOCKS)] + [".pooler."]
        due = {n for n in before if any(word in n for word in words)}
        wrong += len(_changed(model, before) ^ due) + len(set(schedule.fresh) ^ due)
        for name in due:
            value = model.state_dict()[name]
            if value.dim() > 1:
                std = 0.02 / (2 * BLOCKS) ** 0.5 if "c_proj" in name else 0.02
                worst = max(worst, abs(float(value.std()) / std - 1))
            else:
                one = name.endswith("weight")
                moved += int((value != float(one)).sum())
    return [
        Check("tensors that changed and should not have, or the other way round", wrong, "==", 0),
        Check("largest error of a spread, share", worst, "<=", 0.05),
        Check("biases that are not 0, norms that are not 1 and 0", moved, "==", 0),
    ]


@CLAIM.exact
def once_and_not_on_the_way() -> list[Check]:
    """A run that goes on changes nothing, nor does a second attachment; seeds give the same start, or another."""
    first, resumed, again, other = (_loaded() for _ in range(4))
    before = copy.deepcopy(first.state_dict())
    schedule = _attached(first, frozen=None)
    drawn = copy.deepcopy(first.state_dict())
    schedule.attach(first, torch.optim.AdamW(first.parameters()))
    _attached(resumed, schedule.training_state(), frozen=None)
    torch.manual_seed(1)
    _attached(again, frozen=None)
    _attached(other, frozen=None, seed=1)
    return [
        Check("tensors changed by the state of a checkpoint", len(_changed(resumed, before)), "==", 0),
        Check("tensors changed by attaching again", len(_changed(first, drawn)), "==", 0),
        Check("tensors that differ with the same seed", len(_changed(again, drawn)), "==", 0),
        Check("tensors that differ with another seed", len(_changed(other, drawn)), "==", 7),
    ]


@CLAIM.exact
def the_bottom_rests() -> list[Check]:
    """With `frozen` = k what trains is what trains under telly; three steps leave the rest as it was, bit for bit."""
    differ, moved = 0, 0
    for k in range(BLOCKS):
        ours, theirs = _loaded(), _loaded()
        schedule = FreshTop(blocks=1, frozen=k)
        optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-2, weight_decay=0.1)
        schedule.attach(ours, optimizer)
        telly = Telly(blocks=k)
        telly.attach(theirs, torch.optim.AdamW(theirs.parameters()))
        telly.begin_step(0)
        before = copy.deepcopy(ours.state_dict())
        for step in range(3):
            schedule.begin_step(step)
            ours(input_ids=torch.arange(12).view(2, 6), labels=torch.tensor([0, 1])).loss.backward()
            optimizer.step()
        trains, expected = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (ours, theirs))
        differ += len(trains ^ expected)
        moved += len(_changed(ours, before) - trains)
    return [
        Check("parameters that train here or there alone", differ, "==", 0),
        Check("resting tensors that changed", moved, "==", 0),
    ]
