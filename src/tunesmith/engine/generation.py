"""`tunesmith generate`: prompts in, texts out, plainly or with a part of `decoding` or `inference`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch

from tunesmith import catalog
from tunesmith.core.decoding import build
from tunesmith.core.prompt import Prompt
from tunesmith.errors import DataError, ModelError, RecipeError
from tunesmith.inputs.limits import positions
from tunesmith.models.loader import Loaded, load_model


@dataclass(frozen=True)
class Request:
    """How to answer. `temperature` 0 is greedy; `method` names a part of `decoding` or `inference`."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = False
    method: str | None = None
    helpers: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)


def prompts_of(prompt: str | None, file: Path | None, stdin: TextIO) -> list[str]:
    """The prompts that a command line gives.

    Raises:
        DataError: a line of the file has no text under `prompt`, or there is nothing to answer.
    """
    if prompt is not None and file is not None:
        raise DataError(f"--prompt and --file {file} both give prompts; give one of them")
    if prompt is not None:
        return [prompt]
    if file is None:
        text = stdin.read()
        if not text.strip():
            raise DataError("there is no prompt: give --prompt TEXT, --file FILE, or text on standard input")
        return [text]
    if not file.is_file():
        raise DataError(f"there is no file {file}")
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: {error}") from None
    prompts = []
    # Not splitlines: JSON allows the other characters that Unicode ends lines with inside a string.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            raise DataError(f'{file}:{number}: expected an object such as {{"prompt": "..."}}') from None
        if not isinstance(found, str):
            raise DataError(f"{file}:{number}: field 'prompt': expected text, found a {type(found).__name__}")
        prompts.append(found)
    if not prompts:
        raise DataError(f'{file} has no prompts; expected a line such as {{"prompt": "..."}} for each')
    return prompts


def answer(name: str, prompts: list[str], request: Request) -> list[str]:
    """The model's answer to each prompt, one at a time.

    Raises:
        ModelError: the model does not generate text.
        RecipeError: a part that does not exist, or a helper model that it needs is missing.
        DataError: a prompt without tokens, or longer than the model takes.
    """
    loaded = load_model(name)
    if loaded.task not in ("causal-lm", "seq2seq"):
        raise ModelError(f"{name} is a model for {loaded.task}; it does not generate text")
    processors, inference = _method(loaded, request)
    try:
        return [_one(loaded, prompt, request, processors) for prompt in prompts]
    finally:
        if inference is not None:
            inference.detach()


def _method(loaded: Loaded, request: Request) -> tuple[Any, Any]:
    if request.method is None:
        if request.helpers or request.options:
            raise RecipeError("helper models and options belong to a method; name it by --with")
        return None, None
    part = catalog.get(request.method)
    if part.room == "decoding":
        if part.target.roles and loaded.task == "seq2seq":
            raise RecipeError(
                f"{part.slug} asks helper models that read what {loaded.source} wrote, and those do not see the prompt "
                "of an encoder-decoder; take a causal language model"
            )
        missing = [role for role in part.target.roles if role not in request.helpers]
        if missing:
            flags = ", ".join(f"--helper {role}=MODEL" for role in missing)
            raise RecipeError(f"{part.slug} needs {len(part.target.roles)} helper models; missing: {flags}")
        held = {role: load_model(model) for role, model in request.helpers.items()}
        helpers = {role: (one.model, one.processor) for role, one in held.items()}
        return build(part.slug, loaded.model, loaded.processor, helpers, **request.options), None
    if part.room == "inference":
        if request.helpers:
            raise RecipeError(f"{part.slug} takes no helper models; given {', '.join(request.helpers)}")
        inference = part.target(**part.validate(request.options))
        inference.attach(loaded.model)
        return None, inference
    raise RecipeError(f"{part.slug!r} is in the room {part.room}; --with takes parts of decoding and inference")


def _one(loaded: Loaded, prompt: str, request: Request, processors: Any) -> str:
    tokenizer: Any = loaded.processor
    if request.chat:
        if not tokenizer.chat_template:
            raise ModelError(f"the tokenizer of {loaded.source} has no chat template; leave out --chat")
        given = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        given = tokenizer(prompt, return_tensors="pt")
    given = {k: v.to(loaded.model.device) for k, v in given.items() if k in ("input_ids", "attention_mask")}
    room = _room(loaded, given["input_ids"].shape[1], request.max_new_tokens)
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature > 0:
        sampling = {"do_sample": True, "temperature": request.temperature, "top_p": request.top_p, "top_k": 0}
    torch.manual_seed(request.seed)
    with torch.no_grad():
        out = loaded.model.generate(**given, max_new_tokens=room, logits_processor=processors, **sampling)
    start = 0 if loaded.task == "seq2seq" else given["input_ids"].shape[1]
    return tokenizer.decode(out[0, start:], skip_special_tokens=True)


def _room(loaded: Loaded, length: int, wanted: int) -> int:
    """How many tokens the model can add to a prompt of `length`."""
    if not length:
        raise DataError("the prompt is empty: the model has nothing to go on from")
    limit = positions(loaded.model.config)
    if limit is None:
        return wanted
    limit -= sum(module.length for module in loaded.model.modules() if isinstance(module, Prompt))
    if loaded.task == "seq2seq":
        free, fits = limit, length <= limit
    else:
        free, fits = limit - length, length < limit
    if not fits:
        raise DataError(f"the prompt has {length} tokens, and {loaded.source} has places for {limit}; shorten it")
    return min(wanted, free)
