"""What is special to fresh top."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn

from tests.zoo import FAMILIES, VOCABULARY, checkpoint, same, tiny
from tunesmith.core.modelmap import depths
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.schedules.fresh_top import FreshTop, top


def attached(model: nn.Module, **options: Any) -> FreshTop:
    schedule = FreshTop(**options)
    schedule.attach(model, torch.optim.AdamW(model.parameters()))
    schedule.begin_step(0)
    return schedule


def different(model: nn.Module) -> nn.Module:
    """With every tensor far from what a start gives it."""
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_top_is_new_and_the_rest_is_bit_equal(family: str) -> None:
    changes = {"gpt2": {"n_layer": 4}, "t5": {}}.get(family, {"num_hidden_layers": 4})
    model = different(tiny(family, **changes))
    before = checkpoint(model)
    schedule = attached(model, blocks=1, frozen=None)
    place = depths(before)
    stacks = [d.stack for d in place.values() if d]
    fresh = {
        name
        for name, depth in place.items()
        if (depth and depth.stack == stacks[-1] and depth.index == depth.count - 1) or "pooler" in name
    }
    assert set(schedule.fresh) == fresh
    for name, p in model.named_parameters():
        if name not in fresh:
            assert torch.equal(p, before[name]), name
        elif p.dim() > 1:
            assert p.abs().max() < 5, name
            assert p.unique().numel() > p.numel() // 2, name
        else:
            assert bool((p == 0).all()) or bool((p == 1).all()), name


def test_the_spread_is_the_configs() -> None:
    config = T.BertConfig(
        vocab_size=30, hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=256,
        initializer_range=0.05,
    )  # fmt: skip
    model = different(T.BertForSequenceClassification(config))
    schedule = attached(model, blocks=2, frozen=None)
    held = checkpoint(model)
    for name in schedule.fresh:
        if held[name].dim() > 1:
            assert float(held[name].std()) == pytest.approx(0.05, rel=0.05), name
            assert abs(float(held[name].mean())) < 0.002
        else:
            expected = 1.0 if "LayerNorm.weight" in name else 0.0
            assert bool((held[name] == expected).all()), name
    assert len({float(held[n].flatten()[0]) for n in schedule.fresh if held[n].dim() > 1}) > 10, "each its own stream"


def test_gpt2s_projections_have_their_own_spread() -> None:
    model = different(T.GPT2LMHeadModel(T.GPT2Config(vocab_size=20, n_embd=128, n_layer=2, n_head=2, n_positions=8)))
    attached(model, blocks=1, frozen=None)
    block = model.transformer.h[1]
    assert float(block.mlp.c_proj.weight.std()) == pytest.approx(0.02 / 2, rel=0.05)
    assert float(block.attn.c_proj.weight.std()) == pytest.approx(0.02 / 2, rel=0.05)
    assert float(block.mlp.c_fc.weight.std()) == pytest.approx(0.02, rel=0.05)


def test_what_was_loaded_is_drawn_too(tmp_path: Path) -> None:
    """transformers marks loaded tensors, and `_init_weights` then leaves them alone."""
    different(tiny("bert")).save_pretrained(tmp_path)
    model = T.BertForSequenceClassification.from_pretrained(tmp_path)
    weight = model.bert.encoder.layer[1].output.dense.weight
    assert getattr(weight, "_is_hf_initialized", False)
    attached(model)
    assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.2)
    assert weight._is_hf_initialized
    assert bool((model.bert.encoder.layer[0].output.dense.weight == 0.5).all())


def test_seeds_tell_starts_apart_and_global_numbers_stay() -> None:
    found = []
    for seed in (0, 0, 1):
        model = tiny("bert").bfloat16()
        torch.manual_seed(len(found))
        state = torch.get_rng_state()
        attached(model, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        found.append(checkpoint(model))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_model_is_drawn_once() -> None:
    model = tiny("bert")
    schedule = attached(model)
    different(model)
    schedule.attach(model, torch.optim.AdamW(model.parameters()))
    assert bool((model.bert.encoder.layer[1].output.dense.weight == 0.5).all())


def test_the_state_of_a_checkpoint_keeps_a_loop_from_beginning_anew() -> None:
    model = tiny("bert")
    before = checkpoint(model)
    schedule = FreshTop(frozen=None)
    schedule.restore(attached(tiny("bert")).training_state())
    schedule.attach(model, torch.optim.AdamW(model.parameters()))
    assert same(before, checkpoint(model))
    assert schedule.fresh == ()


class Watch(T.TrainerCallback):
    def __init__(self) -> None:
        self.seen: dict[int, Any] = {}

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.seen[state.global_step] = checkpoint(model)


def test_a_resumed_run_without_the_mixin_does_not_begin_anew(tmp_path: Path) -> None:
    ids = torch.randint(3, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * 7, "labels": 1} for row in ids]

    def train(steps: int, resume: bool) -> tuple[T.Trainer, Watch]:
        args = T.TrainingArguments(
            output_dir=str(tmp_path), max_steps=steps, save_steps=2, use_cpu=True, report_to=[], disable_tqdm=True,
            per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
        )  # fmt: skip
        watch = Watch()
        trainer = T.Trainer(
            model=tiny("bert"), args=args, train_dataset=rows, callbacks=[FreshTop(blocks=1, frozen=None), watch]
        )
        trainer.train(resume_from_checkpoint=resume)
        return trainer, watch

    trainer, watch = train(2, False)
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(watch.seen[0][name], checkpoint(tiny("bert"))[name])
    stopped = checkpoint(trainer.model)
    _, watch = train(4, True)
    assert same(watch.seen[2], stopped)


def test_bottom_and_top_together() -> None:
    model = tiny("bert", num_hidden_layers=4)
    attached(model, blocks=2, frozen=1)
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert not [n for n in trains if "embeddings" in n or "layer.0." in n]
    assert [n for n in trains if "layer.1." in n]
    with pytest.raises(ModelError, match="in the top 3 blocks, which begin anew, and in the bottom 2, which rest"):
        attached(tiny("bert", num_hidden_layers=4), blocks=3, frozen=2)
    with pytest.raises(ModelError, match=r"5 blocks were asked for at the top of 'bert\.encoder\.layer', which has 4"):
        attached(tiny("bert", num_hidden_layers=4), blocks=5)
    headless = T.BertModel(tiny("bert").config, add_pooling_layer=False)
    with pytest.raises(TunesmithError, match="freeze fewer"):
        attached(headless, blocks=0, frozen=2)


def test_stacks_and_poolers() -> None:
    t5 = tiny("t5")
    assert top(t5, 1) == ["decoder.block.1"]
    assert top(t5, 1, stack="first") == ["encoder.block.1"]
    assert top(t5, 1, stack="all") == ["encoder.block.1", "decoder.block.1"]
    bert = tiny("bert")
    assert top(bert, 1) == ["bert.encoder.layer.1", "bert.pooler"]
    assert top(bert, 2, pooler=False) == ["bert.encoder.layer.0", "bert.encoder.layer.1"]
    assert top(bert, 0) == []


def test_shared_weights_and_foreign_models_are_refused() -> None:
    small = {"vocab_size": 20, "embedding_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    albert = T.AlbertForSequenceClassification(T.AlbertConfig(**small, num_hidden_layers=3))
    with pytest.raises(ModelError, match="share the weights"):
        attached(albert, frozen=None)

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
            self.head = nn.Linear(2, 2)

    with pytest.raises(ModelError, match="Plain is no model of transformers"):
        attached(Plain(), frozen=None)
    tied = tiny("bert")
    tied.classifier.register_parameter("extra", tied.bert.encoder.layer[1].output.dense.bias)
    with pytest.raises(ModelError, match=r"is tied to a tensor of 'bert\.encoder\.layer\.1'"):
        attached(tied, frozen=None)


def test_under_an_adapter_nothing_is_drawn_and_that_is_said() -> None:
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny("llama"), peft.LoraConfig(r=2, target_modules="all-linear"))
    before = checkpoint(model)
    with pytest.warns(UserWarning, match="nothing in the top 1 blocks of PeftModel trains"):
        schedule = attached(model)
    assert schedule.fresh == ()
    assert same(before, checkpoint(model))
