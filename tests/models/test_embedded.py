"""The embedded models: they load, they are small, and they can do what their cards say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from tunesmith import world
from tunesmith.errors import ModelError
from tunesmith.models.diffusion import Diffusion
from tunesmith.models.embedded import EMBEDDED, WEIGHTS, path
from tunesmith.models.pretrain import encoder, unet, vit
from tunesmith.models.pretrain.evaluate import FORMS, Form, exact_match, perplexity
from tunesmith.world import images

LANGUAGE_MODELS = ("tiny-lm-m", "tiny-lm-s")
SHOWN = tuple(world.families(pretraining=True))
AUTO: dict[str, Any] = {
    "tiny-lm-m": AutoModelForCausalLM,
    "tiny-lm-s": AutoModelForCausalLM,
    "tiny-encoder": AutoModelForMaskedLM,
    "tiny-vit": AutoModelForImageClassification,
    "tiny-unet": Diffusion,
}
_loaded: dict[str, Any] = {}


def load(name: str) -> Any:
    if name not in _loaded:
        _loaded[name] = AUTO[name].from_pretrained(path(name)).eval()
    return _loaded[name]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(path("tokenizer"))


def figures(name: str) -> dict[str, Any]:
    return json.loads((path(name) / "figures.json").read_text())


def test_all_weights_together_are_small() -> None:
    size = sum(file.stat().st_size for file in WEIGHTS.rglob("*") if file.is_file())
    assert size < 20_000_000
    assert {folder.name for folder in WEIGHTS.iterdir() if not folder.name.startswith(".")} == set(EMBEDDED)
    assert not [file for file in WEIGHTS.rglob("*") if file.suffix in (".bin", ".pt", ".pkl")]


def test_paths_need_no_torch_and_unknown_names_are_errors() -> None:
    code = (
        "import sys, importlib.util as u; s = u.spec_from_file_location('e', sys.argv[1]); m = u.module_from_spec(s); "
        "s.loader.exec_module(m); assert m.path('tiny-vit').is_dir(); print('torch' in sys.modules)"
    )
    source = str(WEIGHTS.parent / "embedded.py")
    said = subprocess.run([sys.executable, "-c", code, source], capture_output=True, text=True, check=True).stdout
    assert said == "False\n"
    with pytest.raises(ModelError, match=r"'tiny-lm-n'\. Did you mean 'tiny-lm-"):
        path("tiny-lm-n")


@pytest.mark.parametrize("name", AUTO)
def test_models_load_from_their_folder_in_bfloat16(name: str) -> None:
    model = load(name)
    assert model.dtype == torch.bfloat16
    assert sum(p.numel() for p in model.parameters()) == figures(name)["parameters"]
    summary = EMBEDDED[name]
    stated = float(summary.split(" M parameters")[0].split()[-1])
    assert stated == round(figures(name)["parameters"] / 1e6, 1)


@pytest.mark.parametrize("name", AUTO)
def test_cards_state_the_figures(name: str) -> None:
    card = (path(name) / "README.md").read_text()
    found = figures(name)
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert f"| parameters | {found['parameters']} |" in card
    assert f"| seed | {found['seed']} |" in card
    if name in LANGUAGE_MODELS:
        assert found["items"] >= 200
        for family, match in found["exact_match"].items():
            assert f"| {family} | {match['plain']:.3f} | {match['chat']:.3f} |" in card


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_do_what_their_cards_say(name: str, form: Form, tokenizer: Any) -> None:
    claimed = figures(name)["exact_match"]
    assert set(claimed) == set(SHOWN)
    for family in SHOWN:
        found = exact_match(load(name), tokenizer, world.get(family), 40, form, seed=1)
        expected = claimed[family][form]
        spread = 4 * (max(expected * (1 - expected), 0.02) / 40) ** 0.5
        assert abs(found - expected) < spread, (family, found, expected)
        if name == "tiny-lm-m":
            assert expected >= 0.9, family
            assert found >= 0.8, family


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_perplexity_on_real_text_is_that_of_the_card(name: str, tokenizer: Any) -> None:
    expected = figures(name)["perplexity"]
    if sys.version_info[:2] != tuple(map(int, figures(name)["versions"]["python"].split(".")[:2])):
        expected *= 1.15  # another standard library
    found = perplexity(load(name), tokenizer, windows=16)
    assert 0.6 * expected < found < 1.6 * expected


def test_unknown_things_are_unknown(tokenizer: Any) -> None:
    # what is kept for fine-tuning must be far from solved, or there is nothing to learn
    for family in ("rotate", "new_facts", "third_language"):
        assert exact_match(load("tiny-lm-m"), tokenizer, world.get(family), 20, "plain") <= 0.25, family


def test_left_padding_does_not_change_an_answer(tokenizer: Any) -> None:
    model = load("tiny-lm-m")
    prompts = [item.prompt for name in SHOWN for item in world.get(name).items(2, split="heldout", seed=5)]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"].min() == 0
    together = model.generate(**batch, do_sample=False, max_new_tokens=20)[:, batch["input_ids"].shape[1] :]
    for prompt, row in zip(prompts, together, strict=True):
        one = tokenizer(prompt, return_tensors="pt")
        alone = model.generate(**one, do_sample=False, max_new_tokens=20)[0, one["input_ids"].shape[1] :]
        assert tokenizer.decode(alone, skip_special_tokens=True) == tokenizer.decode(row, skip_special_tokens=True)


def test_encoder_fills_in_what_its_card_says() -> None:
    tokenizer = AutoTokenizer.from_pretrained(path("tiny-encoder"))
    assert tokenizer.padding_side == "right"
    claimed = figures("tiny-encoder")
    found = encoder.measure(load("tiny-encoder"), tokenizer)
    assert claimed["masked_accuracy"] > 2 * claimed["unigram_accuracy"]
    assert abs(found["masked_accuracy"] - claimed["masked_accuracy"]) < 0.03


def test_vit_reads_digits_as_its_card_says() -> None:
    claimed = figures("tiny-vit")
    assert claimed["accuracy"] >= 0.95
    assert vit.measure(load("tiny-vit"))["accuracy"] == pytest.approx(claimed["accuracy"], abs=0.01)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "1", "P", "LA"])
def test_vit_takes_any_image(mode: str) -> None:
    from PIL import Image

    processor = AutoImageProcessor.from_pretrained(path("tiny-vit"))
    image = Image.fromarray(images.digits("heldout")[0][0]).resize((30, 21)).convert(mode)
    inputs = processor(image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 8, 8)
    model = load("tiny-vit")
    logits = model(inputs["pixel_values"].to(model.dtype)).logits
    assert logits.shape == (1, 10)


def test_unet_makes_what_its_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    claimed = figures("tiny-unet")
    monkeypatch.setattr(unet, "EACH", 2)
    monkeypatch.setattr(unet, "SAMPLING", 10)
    found = unet.measure(Diffusion.from_pretrained(path("tiny-unet")))
    for name in ("loss", "loss_wrong_caption", "loss_no_caption"):
        assert found[name] == pytest.approx(claimed[name], rel=0.02), name
    assert found["read_as_asked"] >= 0.8
    assert found["ink_thick_to_thin"] >= 1.1
    assert claimed["loss"] < claimed["loss_no_caption"] < claimed["loss_wrong_caption"]
    assert claimed["read_as_asked"] >= 0.9
    assert claimed["ink_thick_to_thin"] >= 1.1
    assert sum(file.stat().st_size for file in path("tiny-unet").iterdir()) < 4_000_000


@given(text=st.text())
@example("12 034\n\n\t x  y \r\n")
@example("<|user|>hi<|eos|>")
@example("\x00 \u00e9e\u0301 \U0001f600 don't")
@settings(max_examples=300, deadline=None)
def test_encoding_loses_nothing(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path("tokenizer")) if "t" not in _loaded else _loaded["t"]
    _loaded["t"] = tokenizer
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_has_single_digits_and_its_special_tokens(tokenizer: Any) -> None:
    assert len(tokenizer) == 2048
    assert tokenizer.padding_side == "left"
    assert tokenizer.tokenize("1234 + 5") == ["1", "2", "3", "4", "Ġ+", "Ġ", "5"]
    assert not [t for t in tokenizer.get_vocab() if any(c.isdigit() for c in t) and len(t) > 1 and t.isascii()]
    special = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id]
    roles = tokenizer.convert_tokens_to_ids(["<|system|>", "<|user|>", "<|assistant|>"])
    assert len(set(special + roles)) == 7
    assert tokenizer.unk_token is None
    assert tokenizer("")["input_ids"] == []


@pytest.mark.parametrize("name", [*LANGUAGE_MODELS, "tiny-encoder"])
def test_all_language_models_share_the_tokenizer(name: str) -> None:
    shared, own = path("tokenizer"), path(name)
    assert (own / "tokenizer.json").read_bytes() == (shared / "tokenizer.json").read_bytes()
    assert (own / "chat_template.jinja").read_bytes() == (shared / "chat_template.jinja").read_bytes()
    loaded = AutoTokenizer.from_pretrained(own)
    assert loaded("Copy: a b\n")["input_ids"] == AutoTokenizer.from_pretrained(shared)("Copy: a b\n")["input_ids"]


def test_prompt_and_answer_are_tokenized_alike_together_and_apart(tokenizer: Any) -> None:
    for family in world.families().values():
        for item in family().items(20):
            apart = tokenizer(item.prompt)["input_ids"] + tokenizer(item.answer)["input_ids"]
            assert tokenizer(item.prompt + item.answer)["input_ids"] == apart


def test_chat_template(tokenizer: Any) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "Bye"},
    ]
    text = "<|system|>Be brief.<|user|>Hi<|assistant|>Yes<|eos|><|user|>Bye"
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text
    assert tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text + "<|assistant|>"
    with pytest.raises(Exception, match="role must be system, user or assistant, found tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)
    encoded = tokenizer.apply_chat_template(turns, return_dict=True, return_assistant_tokens_mask=True)
    answer = [t for t, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert tokenizer.decode(answer) == "Yes<|eos|>"
