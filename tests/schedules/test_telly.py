"""What is special to Telly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as T
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.zoo import batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.meters import state_bytes
from tunesmith.errors import ModelError, RecipeError, TunesmithError
from tunesmith.schedules.telly import Telly


def attached(model: nn.Module, **options: Any) -> Telly:
    schedule = Telly(**options)
    schedule.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    schedule.begin_step(0)
    return schedule


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_the_embedding_and_the_bottom_blocks_rest() -> None:
    model = tiny("llama", num_hidden_layers=4)
    attached(model, blocks=3)
    assert {n.split(".")[2] for n in training(model) if ".layers." in n} == {"3"}
    assert {n for n in training(model) if ".layers." not in n} == {"model.norm.weight", "lm_head.weight"}
    assert len(training(model)) == 11


@pytest.mark.parametrize(("layers", "frozen"), [(12, 5), (24, 10), (6, 2), (4, 2), (2, 1), (1, 1)])
def test_without_a_number_the_share_of_the_paper(layers: int, frozen: int) -> None:
    model = tiny("llama", num_hidden_layers=layers)
    attached(model)
    assert len({n.split(".")[2] for n in training(model) if ".layers." in n}) == layers - frozen


def test_zero_freezes_the_embedding_alone() -> None:
    model = tiny("bert")
    every = training(model)
    attached(model, blocks=0)
    assert {n for n in every - training(model)} == {n for n in every if "embeddings" in n}


def test_the_pooler_is_frozen_only_if_asked() -> None:
    model = tiny("bert")
    attached(model, blocks=1)
    assert "bert.pooler.dense.weight" in training(model)
    other = tiny("bert")
    attached(other, blocks=1, freeze_pooler=True)
    assert training(model) - training(other) == {"bert.pooler.dense.weight", "bert.pooler.dense.bias"}


def test_the_stack_can_be_chosen() -> None:
    model = tiny("t5")
    attached(model, blocks=2, stack="decoder.block")
    assert {n.split(".")[0] for n in training(model) if ".block." in n} == {"encoder"}
    with pytest.raises(ModelError, match=r"3 blocks were asked for at the bottom of 'encoder.block', which has 2"):
        attached(tiny("t5"), blocks=3)
    with pytest.raises(
        ModelError, match=r"stack='decoder.layers' means 0 of the stacks .* encoder.block, decoder.block"
    ):
        attached(tiny("t5"), stack="decoder.layers")


def test_nothing_left_to_train_is_an_error() -> None:
    model = tiny("llama")
    for name, p in model.named_parameters():
        p.requires_grad_(".layers.0." in name)
    with pytest.raises(TunesmithError, match="all of the 9 parameters that train are in the embedding or the bottom 1"):
        attached(model, blocks=1)


def test_the_optimizer_holds_no_state_of_what_rests() -> None:
    model = tiny("llama", num_hidden_layers=4)
    schedule = attached(model, blocks=2)
    assert schedule.optimizer is not None
    model(**batch("llama")).loss.backward()
    schedule.optimizer.step()
    held = [p for p in model.parameters() if p.requires_grad]
    assert state_bytes(schedule.optimizer) == sum(8 * p.numel() + 4 for p in held)


def run(folder: Path, **options: Any) -> tuple[T.PreTrainedModel, Telly]:
    torch.manual_seed(0)
    model, schedule = tiny("llama", num_hidden_layers=4), Telly(blocks=2, **options)
    g = torch.Generator().manual_seed(4)
    ids = torch.randint(3, 64, (8, 7), generator=g).tolist()
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 0}
    arguments = T.TrainingArguments(
        str(folder), num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-2, **settings
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    T.Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[schedule]).train()
    return model, schedule


def test_a_trainer_with_and_without_the_cache(tmp_path: Path) -> None:
    """Rows come back shuffled into other batches of the same shape."""
    plain, _ = run(tmp_path / "a")
    cached, schedule = run(tmp_path / "b", cache=True)
    assert schedule.prefix is not None
    assert (schedule.prefix.misses, schedule.prefix.hits) == (8, 16)
    assert same(checkpoint(plain), checkpoint(cached))
    assert "forward" not in vars(cached.model.layers[0])


def test_the_cache_goes_with_the_schedule() -> None:
    first, second = tiny("llama").train(), tiny("llama").train()
    schedule = attached(first, blocks=1, cache=True)
    schedule.attach(second, torch.optim.AdamW(second.parameters()))
    assert "forward" not in vars(first.model.layers[0])
    assert "forward" in vars(second.model.layers[0])
    schedule.detach()
    assert "forward" not in vars(second.model.layers[0])


def test_what_cannot_be_cached_is_refused() -> None:
    with pytest.raises(TunesmithError, match=r"LlamaAttention 'model.layers.0.self_attn' \(attention_dropout=0.1\)"):
        attached(tiny("llama", attention_dropout=0.1), cache=True)
    with pytest.raises(TunesmithError, match="several, and the blocks of a decoder read an encoder that trains"):
        attached(tiny("t5"), stack="all", cache=True)
    with pytest.raises(TunesmithError, match="freeze at least one"):
        attached(tiny("llama"), blocks=0, cache=True)


@pytest.mark.parametrize("options", [{"blocks": -1}, {"cache_gib": 0}, {"cache": "often"}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        catalog.get("telly").validate(options)


@pytest.mark.distributed
@pytest.mark.parametrize("cache", [False, True])
def test_under_data_parallel(cache: bool, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        plain, wrapped = (tiny("llama", num_hidden_layers=4).train() for _ in range(2))
        parallel = DistributedDataParallel(wrapped, find_unused_parameters=True)
        for model, call in ((plain, plain), (wrapped, parallel)):
            schedule = attached(model, blocks=2, cache=cache and model is wrapped)
            assert schedule.optimizer is not None
            for _ in range(3):
                call(**batch("llama")).loss.backward()
                schedule.optimizer.step()
                schedule.optimizer.zero_grad()
        assert all(
            torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True)
        )
    finally:
        dist.destroy_process_group()
