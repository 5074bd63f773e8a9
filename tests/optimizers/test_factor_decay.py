"""Factor decay: which parameters are factors, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tunesmith
from tests.zoo import tiny
from tunesmith.errors import RecipeError
from tunesmith.optimizers.factor_decay import FactorDecay
from tunesmith.recipe import load


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
        tunesmith.adapter("dylora", rank=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
    ],
    ids=["peft", "ours"],
)
def test_factors_are_found_by_name_and_the_rest_decays_as_the_run_says(config: object) -> None:
    model = get_peft_model(tiny("llama"), config)
    groups = FactorDecay.groups(model, weight_decay=0.01, decay_a=0.2, decay_b=0.7)
    names = {id(p): n for n, p in model.named_parameters()}
    found = {g["weight_decay"]: sorted(names[id(p)] for p in g["params"]) for g in groups}
    assert set(found) == {0.2, 0.7, 0.01}
    assert all("A" in n.split(".")[-1] or "lora_A" in n or "embedding_A" in n for n in found[0.2])
    assert len(found[0.2]) == len(found[0.7]) == 3
    assert all("modules_to_save" in n for n in found[0.01])


def test_a_bias_or_a_module_called_by_a_longer_word_is_no_factor() -> None:
    model = torch.nn.ModuleDict({"Attention": torch.nn.Linear(2, 2), "B_norm": torch.nn.Linear(2, 2)})
    assert {g["weight_decay"] for g in FactorDecay.groups(model, weight_decay=0.1)} == {0.1, 0.0}


def test_a_run_without_factors_is_refused_before_loading() -> None:
    with pytest.raises(RecipeError, match=r"factor-decay cannot run here .*no factors"):
        load({"method": "full", "optimizer": "factor-decay"}).check()
