"""What is special to IST."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as T
from torch import nn

import tunesmith
from tests.zoo import VOCABULARY, batch, checkpoint, same, tiny
from tunesmith import catalog
from tunesmith.core.gates import gated_layers
from tunesmith.core.steps import callbacks as adapter_callbacks
from tunesmith.core.trainer import STATE_FILE, TrainerMixin
from tunesmith.errors import CheckpointError, ModelError, RecipeError, TunesmithError
from tunesmith.objectives.sft import SFT
from tunesmith.schedules.ist import IST

STEPS = 8
ADAPTERS = ["lora", "dora", "dylora", "ssf"]


class Trainer(TrainerMixin, T.Trainer):
    pass


def adapted(kind: str = "lora", family: str = "llama", blocks: int = 4, **changes: Any) -> nn.Module:
    """A tiny model with adapters that do something."""
    model = tiny(family, **({} if family == "t5" else {"num_hidden_layers": blocks}), **changes)
    torch.manual_seed(0)
    if kind in ("lora", "dora"):
        options = {"use_dora": kind == "dora", "init_lora_weights": False}
        return peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear", **options))
    given = {"rank": 4} if kind == "dylora" else {"std": 0.5}
    made = peft.get_peft_model(model, tunesmith.adapter(kind, **given))
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return made


def attached(model: nn.Module, **options: Any) -> IST:
    schedule = IST(**options)
    schedule.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2))
    return schedule


def loss_of(model: nn.Module, family: str = "llama") -> Callable[[], float]:
    def measure() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(**batch(family)).loss)

    return measure


def training(model: nn.Module) -> set[str]:
    return {n for n, p in model.named_parameters() if p.requires_grad}


def surrogate(schedule: IST, cost: list[float]) -> Callable[[], float]:
    """A loss that grows by what each block costs when it is turned down, read off the gates themselves."""

    def measure() -> float:
        assert schedule.model is not None
        down = [schedule.model.get_submodule(block.layers[0]).factor < 1.0 for block in schedule.members]
        return 0.1 + sum(c for c, turned in zip(cost, down, strict=True) if turned)

    return measure


def test_an_update_is_the_formula() -> None:
    """Written out in plain numbers, block by block, from the losses that were measured."""
    schedule = attached(adapted("ssf", blocks=6), score_lr=7.0, samples=4, interval=3)
    cost = [0.05, 0.3, 0.0, 0.8, 0.2, 0.1]
    scores = [0.3, -0.4, 0.0, 1.0, -1.5, 0.2]
    schedule.scores = torch.tensor(scores, dtype=torch.float64)
    subsets = schedule.suppressions(6)
    assert len(subsets) == 4
    rewards = [math.exp(-0.1 - sum(cost[i] for i in s)) for s in subsets]
    expected = list(scores)
    for subset, reward in zip(subsets, rewards, strict=True):
        for i in subset:
            p = 1 / (1 + math.exp(-scores[i]))
            expected[i] += 7.0 * (reward - sum(rewards) / 4) * p * (1 - p)
    schedule.begin_step(6, surrogate(schedule, cost))
    assert schedule.scores.tolist() == pytest.approx(expected, abs=1e-12)
    assert max(abs(a - b) for a, b in zip(expected, scores, strict=True)) > 0.1


def test_blocks_whose_suppression_costs_are_drawn_more() -> None:
    schedule = attached(adapted("ssf", blocks=8), interval=1)
    measure = surrogate(schedule, [0.0] * 4 + [0.5] * 4)
    for step in range(1, 61):
        schedule.begin_step(step, measure)
    weights = [row["weight"] for row in schedule.importance()]
    assert min(weights[4:]) > 0.6
    assert max(weights[:4]) < 0.4
    drawn = [i for step in range(61, 261) for i in schedule.chosen(step)]
    assert sum(i >= 4 for i in drawn) > 0.8 * len(drawn)


@pytest.mark.parametrize(("blocks", "fraction", "suppressed"), [(2, 1, 1), (3, 1, 1), (4, 1, 2), (7, 1, 3), (9, 2, 4)])
def test_shares_are_rounded_down_to_one_at_least(blocks: int, fraction: int, suppressed: int) -> None:
    schedule = attached(adapted("ssf", blocks=blocks))
    for step in range(1, 12):
        assert len(schedule.chosen(step)) == fraction
        subsets = schedule.suppressions(step)
        assert all(len(set(s)) == suppressed for s in subsets)
        assert len({tuple(s) for s in subsets}) == len(subsets) == min(3, math.comb(blocks, suppressed))


def test_shares_are_not_off_by_a_rounding() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(50))
    assert 50 * 0.58 < 29
    assert len(attached(model, sampling="uniform", fraction=0.58).chosen(0)) == 29


def test_another_run_begins_with_scores_of_zero() -> None:
    schedule = attached(adapted("ssf"), interval=1)
    schedule.begin_step(1, surrogate(schedule, [0.0, 0.1, 0.2, 0.4]))
    assert bool(schedule.scores.any())
    model = adapted("ssf")
    schedule.attach(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]))
    assert not bool(schedule.scores.any())


def test_scores_that_have_collapsed_end_the_search_for_other_sets() -> None:
    schedule = attached(adapted("ssf", blocks=6), interval=1)
    schedule.scores = torch.tensor([1e4, 1e4, 1e4, -1e4, -1e4, -1e4], dtype=torch.float64)
    assert schedule.suppressions(1) == [[0, 1, 2]]
    before = schedule.scores.clone()
    schedule.begin_step(1, lambda: pytest.fail("one set has nothing to be compared with"))
    assert torch.equal(schedule.scores, before)
    assert all(i >= 3 for step in range(20) for i in schedule.chosen(step))
    schedule.scores = torch.tensor([1e4, -2e3, -2e3, -2e3, -2e3, -2e3], dtype=torch.float64)
    assert all(s[0] == 0 for s in schedule.suppressions(1)), "weights below the smallest float still draw"


def test_one_block_trains_always_and_is_not_measured() -> None:
    schedule = attached(adapted("ssf", blocks=1), interval=1)
    for step in range(3):
        schedule.begin_step(step, lambda: pytest.fail("nothing to choose"))
        assert schedule.chosen(step) == [0]


def test_draws_are_the_law_of_drawing_one_after_the_other() -> None:
    schedule = attached(adapted("ssf", blocks=5), fraction=0.4, suppressed=0.4, samples=2)
    schedule.scores = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64)
    n = 2000
    for sign, draws in (
        (-1, (schedule.chosen(step) for step in range(n))),
        (1, (schedule.suppressions(step)[0] for step in range(n))),
    ):
        w = (sign * schedule.scores).sigmoid().tolist()
        law, counts = [0.0] * 5, [0] * 5
        for a, b in itertools.permutations(range(5), 2):
            law[a] += w[a] / sum(w) * w[b] / (sum(w) - w[a])
            law[b] += w[a] / sum(w) * w[b] / (sum(w) - w[a])
        for drawn in draws:
            for i in drawn:
                counts[i] += 1
        for count, q in zip(counts, law, strict=True):
            assert abs(count / n - q) <= 4 * math.sqrt(q * (1 - q) / n)


def test_measurements_come_every_interval_but_not_at_the_start() -> None:
    calls: list[int] = []
    schedule = attached(adapted("ssf"), interval=3, samples=4)
    for step in range(10):
        schedule.begin_step(step, lambda at=step: calls.append(at) or 1.0)
    assert calls == [3] * 4 + [6] * 4 + [9] * 4


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_adapter_can_be_turned_down_and_comes_back(kind: str) -> None:
    model = adapted(kind)
    plain, losses = model.eval()(**batch("llama")).logits.detach(), []
    schedule, measure = attached(model, interval=1), loss_of(model)
    schedule.begin_step(1, lambda: losses.append(measure()) or losses[-1])
    assert len(set(losses)) == 3, "each set of blocks gives another loss"
    assert measure() not in losses
    assert bool((schedule.scores != 0).any())
    assert torch.equal(model(**batch("llama")).logits, plain)


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_gates_open_again_when_measuring_fails(kind: str) -> None:
    model = adapted(kind)
    plain = model.eval()(**batch("llama")).logits.detach()
    schedule = attached(model, interval=1)

    def fail() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        schedule.begin_step(1, fail)
    assert torch.equal(model(**batch("llama")).logits, plain)
    assert not bool(schedule.scores.any())


def test_all_adapters_of_a_block_and_no_other_are_turned_down() -> None:
    model = adapted("dylora")
    schedule, seen = attached(model, interval=1, factor=0.5), []

    def measure() -> float:
        seen.append({n: model.get_submodule(n).factor for n in gated_layers(model)})
        return 1.0

    schedule.begin_step(1, measure)
    for factors, subset in zip(seen, schedule.suppressions(1), strict=True):
        for name, factor in factors.items():
            block = int(name.split(".layers.")[1].split(".")[0])
            assert factor == (0.5 if block in subset else 1.0)


def test_equal_losses_move_nothing() -> None:
    schedule = attached(adapted("ssf", blocks=6), interval=1, samples=7)
    for step in range(1, 20):
        schedule.begin_step(step, lambda: 0.1)
    assert not bool(schedule.scores.any())


@pytest.mark.parametrize("loss", [math.nan, -1e3])
def test_a_loss_without_a_reward_is_a_clear_error(loss: float) -> None:
    schedule = attached(adapted("ssf"), interval=1)
    with pytest.raises(TunesmithError, match=r"at step 2, but exp\(-loss\) must be finite"):
        schedule.begin_step(1, lambda: loss)


def test_an_infinite_loss_is_the_worst_reward() -> None:
    schedule = attached(adapted("ssf"), interval=1, samples=2)
    worst, best = schedule.suppressions(1)
    losses = iter([math.inf, 0.5])
    schedule.begin_step(1, lambda: next(losses))
    assert all(schedule.scores[i] < 0 for i in set(worst) - set(best))
    assert all(schedule.scores[i] > 0 for i in set(best) - set(worst))


def test_uniform_draws_need_no_measure_and_no_gates() -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=4), config)
    with pytest.raises(ModelError, match="has no scale that could be turned down"):
        attached(model)
    schedule, seen = attached(model, sampling="uniform", interval=1), set[int]()
    for step in range(40):
        schedule.begin_step(step)
        seen |= set(schedule.chosen(step))
    assert seen == {0, 1, 2, 3}
    assert schedule.training_state() == {}


def test_without_a_way_to_measure_the_error_says_so() -> None:
    schedule = attached(adapted(), interval=2)
    for step in range(2):
        schedule.begin_step(step)
    with pytest.raises(TunesmithError, match=r"IST looks at the loss .*`begin_step\(step, measure=\.\.\.\)"):
        schedule.begin_step(2)


def test_base_weights_and_adapters_outside_of_blocks_are_clear_errors() -> None:
    with pytest.raises(TunesmithError, match=r"'model\.layers\.0' and 1 other blocks train without any"):
        attached(tiny("llama"))
    head = peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(TunesmithError, match="none of the 2 blocks of PeftModel holds anything that trains"):
        attached(head)


def test_what_stands_outside_of_the_blocks_trains_always_and_is_not_turned_down() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], modules_to_save=["norm"])
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=4), config)
    schedule = attached(model)
    assert {n.split(".default")[0].rsplit(".", 1)[-1] for n in schedule.always} == {
        "lora_A",
        "lora_B",
        "modules_to_save",
    }
    assert all("lm_head" in n or ".norm." in n for n in schedule.always)
    assert all(schedule.always < set(schedule.active(step)) for step in range(5))
    assert not any("lm_head" in layer for block in schedule.members for layer in block.layers)


def test_blocks_without_an_adapter_do_not_take_part() -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1, 2, 3, 5])
    model = peft.get_peft_model(tiny("llama", num_hidden_layers=6), config)
    assert [str(row["block"])[-1] for row in attached(model).importance()] == ["1", "2", "3", "5"]


def test_importance_is_plain_data_over_both_stacks() -> None:
    model = adapted(family="t5")
    schedule, measure = attached(model, interval=1), loss_of(model, "t5")
    for step in range(4):
        schedule.begin_step(step, measure)
    rows = json.loads(json.dumps(schedule.importance()))
    assert [row["block"].split("model.")[-1] for row in rows] == [
        "encoder.block.0",
        "encoder.block.1",
        "decoder.block.0",
        "decoder.block.1",
    ]
    for row in rows:
        assert row["weight"] == pytest.approx(1 / (1 + math.exp(row["score"])))
    assert any(row["score"] for row in rows)


@pytest.mark.parametrize("keep", [True, False])
def test_state_of_blocks_that_rest(keep: bool) -> None:
    """Kept, it is bit for bit as it was, and the step counter goes on; without, it begins anew."""
    model = adapted(blocks=5)
    schedule = attached(model, sampling="uniform", keep_state=keep)
    optimizer = schedule.optimizer
    assert optimizer is not None
    trained = dict.fromkeys(schedule.eligible, 0)
    for step in range(20):
        before = {p: copy.deepcopy(state) for p, state in optimizer.state.items()}
        schedule.begin_step(step)
        model(**batch("llama")).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        active = training(model)
        for name, p in schedule.eligible.items():
            if name in active:
                trained[name] = trained[name] + 1
                assert int(optimizer.state[p]["step"]) == trained[name]
            elif keep and trained[name]:
                assert all(torch.equal(before[p][key], value) for key, value in optimizer.state[p].items())
            else:
                assert p not in optimizer.state
                trained[name] = 0
    assert not keep or max(trained.values()) > 2


def rows(n: int = 24) -> list[dict[str, list[int]]]:
    ids = torch.randint(3, VOCABULARY, (n, 7), generator=torch.Generator().manual_seed(4)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * 7, "labels": row} for row in ids]


def run(folder: Path, schedule: IST, kind: str = "lora", resume: str | None = None, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "optim": "adamw_torch",
    }
    arguments = T.TrainingArguments(output_dir=str(folder), **{**settings, **changes})
    model = adapted(kind, attention_dropout=0.1)
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows(),
        callbacks=[schedule, *adapter_callbacks(model)],
        objective=SFT(),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(("kind", "stop"), [("lora", 3), ("dylora", 3), ("dylora", 4)])
def test_resuming_with_state_kept_gives_the_same_bits(kind: str, stop: int, tmp_path: Path) -> None:
    """Under gradient accumulation, in the middle between two updates of the scores and right before one."""
    options: dict[str, Any] = {"interval": 2, "score_lr": 1e4}
    through = IST(**options)
    whole = run(tmp_path / "through", through, kind)
    run(tmp_path / "stopped", IST(**options), kind, save_strategy="steps", save_steps=stop)
    folder = tmp_path / "stopped" / f"checkpoint-{stop}"
    resumed = IST(**options)
    again = run(tmp_path / "again", resumed, kind, resume=str(folder))
    assert same(checkpoint(again.model), checkpoint(whole.model))
    assert torch.equal(resumed.scores, through.scores)
    assert bool(through.scores.any())
    if kind == "dylora":
        return
    (folder / STATE_FILE).unlink()
    lost = IST(**options)
    run(tmp_path / "lost", lost, kind, resume=str(folder))
    assert not torch.equal(lost.scores, through.scores), "the scores of the checkpoint matter"


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_measuring_disturbs_nothing(kind: str, tmp_path: Path) -> None:
    """With factor 1 the scores stay, so the run has the bits of one that never measures: dropout and ranks included."""
    measured = run(tmp_path / "a", IST(factor=1.0, interval=1), kind)
    unmeasured = run(tmp_path / "b", IST(sampling="uniform"), kind)
    assert same(checkpoint(measured.model), checkpoint(unmeasured.model))


def test_all_micro_batches_of_a_step_are_measured(tmp_path: Path) -> None:
    """The scores of two micro-batches of two rows are those of one batch of four."""
    scores = []
    for micro, accumulated in ((2, 2), (4, 1), (1, 4)):
        schedule = IST(interval=2, score_lr=1e3)
        sizes = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulated}
        # No step changes the model, so that rounding is the only difference.
        run(tmp_path / str(micro), schedule, "ssf", learning_rate=0.0, **sizes)
        scores.append(schedule.scores)
    assert float(scores[0].abs().max()) > 1e-2
    assert torch.allclose(scores[0], scores[1], atol=1e-4)
    assert torch.allclose(scores[0], scores[2], atol=1e-4)


def test_the_scores_of_another_run_are_refused() -> None:
    learned = attached(adapted("ssf", blocks=4)).training_state()
    with pytest.raises(CheckpointError, match="scores of 4 blocks, but 5 hold adapters here"):
        attached(adapted("ssf", blocks=5)).load_training_state(learned)
    with pytest.raises(CheckpointError, match="resume with sampling='importance'"):
        attached(adapted("ssf", blocks=4), sampling="uniform").load_training_state(learned)


def test_what_was_saved_does_not_move_with_the_run() -> None:
    schedule = attached(adapted("ssf"), interval=1)
    saved = schedule.training_state()["scores"]
    losses = iter([0.1, 0.5, 0.9])
    schedule.begin_step(1, lambda: next(losses))
    assert bool(schedule.scores.any())
    assert not bool(saved.any())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    results = []
    for checkpointing in (False, True):
        model = adapted().train()
        if checkpointing:
            model.enable_input_require_grads()
            model.base_model.model.activation_checkpointing_enable({"use_reentrant": reentrant})
        schedule = attached(model)
        schedule.scores = torch.tensor([9.0, 9.0, 9.0, -9.0], dtype=torch.float64)
        schedule.begin_step(0)
        model(**batch("llama")).loss.backward()
        results.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert results[0]
    assert all(".layers.3." in name for name in results[0])
    for name, grad in results[0].items():
        assert torch.allclose(grad, results[1][name], atol=1e-6)


def test_a_model_in_half_precision() -> None:
    model = adapted().to(torch.bfloat16)
    schedule, measure = attached(model, interval=1), loss_of(model)
    for step in range(3):
        schedule.begin_step(step, measure)
    assert schedule.scores.dtype == torch.float64
    assert bool(schedule.scores.any())


@pytest.mark.parametrize(
    "options",
    [{"fraction": 0}, {"fraction": 1.1}, {"suppressed": 1}, {"factor": -0.1}, {"samples": 1}, {"interval": 0}],
)
def test_options_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(options))):
        catalog.get("ist").validate(options)
