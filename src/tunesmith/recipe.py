"""What a run is, as a typed model: YAML in and out, every field with its default and its meaning.

    model: ./my-model                # a folder, a hub id, or the name of an embedded model
    data: {train: rows.jsonl}
    method: dylora                   # or adapters/prompts/schedule/optimizer/objective one by one
    output: runs/first

`tunesmith train --help` and `docs/recipe.md` are made from the descriptions here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, model_validator
from pydantic import ValidationError as PydanticError

from tunesmith import catalog
from tunesmith.core.files import write_text
from tunesmith.core.part import Use, check_combination
from tunesmith.core.ranks import RankTable
from tunesmith.errors import RecipeError, did_you_mean
from tunesmith.recipe_fields import AdapterSpec, DataSpec, ModelSpec, PartSpec, ReportSpec, Section, TrainSpec

Task = Literal["causal-lm", "seq2seq", "text-classification", "image-classification"]
DEFAULT_OPTIMIZER = "adamw_torch"
DEFAULT_LR_SCHEDULE = TrainSpec().lr_schedule
METHODS = {
    "adapters": "adapters",
    "prompts": "prompts",
    "schedules": "schedule",
    "optimizers": "optimizer",
    "objectives": "objective",
    "data": "data.select",
    "inference": "inference",
}
"""Rooms whose parts `method:` may name, and the field of the recipe that such a part goes into."""


class Recipe(Section):
    """A whole run."""

    model: ModelSpec = Field(default_factory=ModelSpec, description="Which model.")
    data: DataSpec = Field(default_factory=DataSpec, description="Which rows.")
    task: Task | None = Field(None, description="Inferred from model and columns if not given.")
    method: str | None = Field(
        None,
        description="Shorthand for one part of any room that trains; `full` trains the weights themselves. With "
        "nothing given here or below: `lora`.",
    )
    adapters: list[AdapterSpec] = Field(
        default_factory=list, description="Parts of the room `adapters`, nearest to the base first."
    )
    prompts: list[PartSpec] = Field(default_factory=list, description="Parts of the room `prompts`.")
    schedule: PartSpec | None = Field(None, description="A part of the room `schedules`.")
    optimizer: PartSpec = Field(
        default_factory=lambda: PartSpec(name=DEFAULT_OPTIMIZER),
        description="A part of the room `optimizers`, or any `optim` of transformers.",
    )
    objective: PartSpec | None = Field(
        None, description="A part of the room `objectives`; None: the task's usual loss."
    )
    regularisers: list[PartSpec] = Field(
        default_factory=list, description="Parts of `objectives` tagged `regulariser`, each with an optional `weight`."
    )
    inference: list[PartSpec] = Field(
        default_factory=list, description="Parts of the room `inference` that the model is tuned for."
    )
    train: TrainSpec = Field(default_factory=TrainSpec, description="How long, how fast.")
    report: ReportSpec = Field(default_factory=ReportSpec, description="What is measured.")
    output: str = Field("runs/latest", description="Folder of the run.")

    @model_validator(mode="after")
    def _place_method(self) -> Recipe:
        if self.method == "full":
            if not self.full:
                given = ", ".join(spec.name for spec in (*self.adapters, *self.prompts))
                raise RecipeError(
                    f"method: full trains the weights themselves, and {given} leaves them frozen; keep one of the two"
                )
            return self
        if self.method is not None:
            self._place(self.method)
        if self.full and self.schedule is None and self.optimizer.name == DEFAULT_OPTIMIZER:
            self.__dict__["adapters"] = [AdapterSpec(name="lora")]
        self._imply()
        return self

    def _imply(self) -> None:
        """Give fields that were left out the values that the parts of the recipe are not themselves without."""
        known = catalog.parts()
        for spec in [spec for _, _, specs in self._parts() for spec in specs]:
            for path, value in (known[spec.name].implies if spec.name in known else {}).items():
                section, _, name = path.rpartition(".")
                owner = getattr(self, section) if section else self
                if name in owner.model_fields_set:
                    continue
                kind = type(owner).model_fields[name].annotation
                owner.__dict__[name] = PartSpec(name=value) if kind is PartSpec else value
                for changed in (owner, self):
                    changed.__pydantic_fields_set__.add(name if changed is owner else section)

    def _place(self, slug: str) -> None:
        """Put the part of the shorthand into its field, as if it had been written there."""
        part = catalog.get(slug)
        place = "regularisers" if "regulariser" in part.tags else METHODS.get(part.room)
        if place is None:
            raise RecipeError(
                f"{slug!r} is in the room {part.room}, which has its own command; `method` takes parts of "
                f"{', '.join(METHODS)}"
            )
        self.__dict__["method"] = None
        owner: Section = self
        field = place
        if place == "data.select":
            owner, field = self.data, "select"
            self.__pydantic_fields_set__.add("data")
        held = getattr(owner, field)
        spec = AdapterSpec(name=slug) if place == "adapters" else PartSpec(name=slug)
        if isinstance(held, list):
            if all(entry.name != slug for entry in held):
                owner.__dict__[field] = [*held, spec]
        elif held is None or held == PartSpec(name=DEFAULT_OPTIMIZER):
            owner.__dict__[field] = spec
        elif held.name != slug:
            raise RecipeError(f"method: {slug} and {field}: {held.name} ask for two different things; keep one")
        # A copy of the recipe is made of the fields that were set.
        owner.__pydantic_fields_set__.add(field)

    @property
    def full(self) -> bool:
        """Whether the base weights themselves train."""
        return not self.adapters and not self.prompts

    def uses(self) -> dict[str, list[Use]]:
        """Every part of the run by its field, options checked.

        Raises:
            RecipeError: a part is not of the field's room, or an option is wrong.
        """
        found: dict[str, list[Use]] = {}
        for field, room, specs in self._parts():
            for spec in specs:
                part = catalog.get(spec.name, room)
                options = {k: v for k, v in spec.options.items() if not (field == "regularisers" and k == "weight")}
                if field == "objective" and "regulariser" in part.tags:
                    raise RecipeError(
                        f"{spec.name!r} adds a term to an objective; it is not one. Put it under `regularisers`."
                    )
                if field == "regularisers" and "regulariser" not in part.tags:
                    raise RecipeError(
                        f"{spec.name!r} replaces the objective; it is not a regulariser. Put it under `objective`."
                    )
                if field == "regularisers":
                    _check_weight(spec)
                found.setdefault(field, []).append(Use(part, part.validate(options)))
        return found

    def _parts(self) -> list[tuple[str, str, list[Any]]]:
        ours = self.optimizer.name in catalog.parts()
        return [
            ("adapters", "adapters", self.adapters),
            ("prompts", "prompts", self.prompts),
            ("schedule", "schedules", [self.schedule] if self.schedule else []),
            ("optimizer", "optimizers", [self.optimizer] if ours else []),
            ("objective", "objectives", [self.objective] if self.objective else []),
            ("regularisers", "objectives", self.regularisers),
            ("inference", "inference", self.inference),
            ("select", "data", self.data.select),
        ]

    def settings(self, world_size: int = 1) -> dict[str, str]:
        """Tags of the run's settings that a part may refuse, with the words to show for each."""
        train = self.train
        possible = {
            "ddp": (world_size > 1 and not train.fsdp, f"{world_size} processes"),
            "fsdp": (train.fsdp, "train.fsdp is true"),
            "gradient-accumulation": (
                train.gradient_accumulation > 1,
                f"train.gradient_accumulation is {train.gradient_accumulation}",
            ),
            "gradient-clipping": (train.max_grad_norm > 0, f"train.max_grad_norm is {train.max_grad_norm}"),
            "gradient-checkpointing": (train.gradient_checkpointing, "train.gradient_checkpointing is true"),
            "padding-free": (
                self.data.padding_free is True or self.data.packing,
                "data.padding_free or data.packing is true",
            ),
            "float-base": (self.model.quantization == "none", "model.quantization is none"),
            "quantized-base": (self.model.quantization != "none", f"model.quantization is {self.model.quantization}"),
            "full-finetuning": (self.full, "no adapter or prompt is given, so the base weights train"),
            "encoder-decoder": (self.task == "seq2seq", "the task is seq2seq"),
        }
        return {tag: words for tag, (holds, words) in possible.items() if holds}

    def check(self, world_size: int = 1) -> dict[str, list[Use]]:
        """Everything that can be known before a model is loaded; returns `uses()`.

        Raises:
            RecipeError: parts that cannot be combined, with each other or with the settings.
        """
        found = self.uses()
        self._check_names()
        for spec, use in zip(self.adapters, found.get("adapters", []), strict=True):
            if spec.ranks is not None:
                RankTable.load(spec.ranks)
                if "rank" not in use.part.options:
                    raise RecipeError(f"adapters: {spec.name} has no `rank`, which `ranks` could set; leave it out")
        every = [use for uses in found.values() for use in uses]
        own = [use.part.slug for use in every if "own-tuner" in use.part.tags]
        layered = [use.part.slug for field in ("adapters", "prompts") for use in found.get(field, [])]
        if own and len(layered) > 1:
            other = next(slug for slug in layered if slug != own[0]) if len(set(layered)) > 1 else own[0]
            raise RecipeError(
                f"{own[0]} cannot be combined with {other}: PEFT injects {own[0]} by a tuner of its own, and takes one "
                "tuner per model."
            )
        if self.full and self.model.quantization != "none":
            raise RecipeError(
                f"model.quantization is {self.model.quantization} and no adapter or prompt is given: codes cannot be "
                "trained. Name an adapter, or load the model unquantised."
            )
        check_combination(every, self.settings(world_size))
        return found

    def _check_names(self) -> None:
        """Names that transformers gives meaning to; it would find out only once the model is loaded."""
        if self.optimizer.name != DEFAULT_OPTIMIZER and self.optimizer.name not in catalog.parts():
            from transformers.training_args import OptimizerNames

            ours = [part.slug for part in catalog.in_room("optimizers")]
            _check_known("optimizer", self.optimizer.name, [*ours, *(name.value for name in OptimizerNames)])
        if self.train.lr_schedule != DEFAULT_LR_SCHEDULE:
            from transformers import SchedulerType

            _check_known("train.lr_schedule", self.train.lr_schedule, [kind.value for kind in SchedulerType])

    def to_yaml(self, path: str | Path | None = None) -> str:
        """The recipe as YAML, defaults left out; written to `path` if given."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        if path is not None:
            write_text(path, text)
        return text


def load(source: str | Path | Mapping[str, Any] | Recipe | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from a YAML file, a mapping or nothing, with `{"a.b": value}` set on top.

    Raises:
        RecipeError: names the file and field, what was expected and what was found.
    """
    name = "recipe"
    if isinstance(source, Recipe):
        content = source.model_dump(exclude_unset=True)
    elif isinstance(source, Mapping):
        content = copy.deepcopy(dict(source))
    elif source is None:
        content = {}
    else:
        name = str(source)
        content = _read_yaml(Path(source))
    for path, value in (overrides or {}).items():
        _set(content, path, value)
    try:
        return Recipe.model_validate(content)
    except PydanticError as error:
        raise RecipeError(f"{name}: {_explain(error)}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise RecipeError(f"there is no recipe file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields; found a {type(content).__name__}")
    return content


def _set(content: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    here: Any = content
    for at, key in enumerate(parents):
        held = here.get(key) if isinstance(here, dict) else None
        if isinstance(held, str) and ".".join(parents[: at + 1]) in ("model", "schedule", "optimizer", "objective"):
            held = {"name": held}
        if held is not None and not isinstance(held, dict):
            raise RecipeError(
                f"--set {path}: {'.'.join(parents[: at + 1])} is not a mapping; write the whole field instead"
            )
        here[key] = held if held is not None else {}
        here = here[key]
    here[last] = value


def _check_weight(spec: PartSpec) -> None:
    weight = spec.options.get("weight", 1.0)
    try:
        found = math.nan if isinstance(weight, bool) else float(weight)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise RecipeError(f"regularisers: the weight of {spec.name} must be a number, found {weight!r}")


def _check_known(field: str, name: str, known: Iterable[str]) -> None:
    names = list(known)
    if name not in names:
        raise RecipeError(f"{field}: there is no {name!r}.{did_you_mean(name, names)} Known: {', '.join(names)}.")


def _explain(error: PydanticError) -> str:
    errors = error.errors()
    first, where = errors[0], _where(errors[0]["loc"])
    if first["type"] == "extra_forbidden":
        section = _section(first["loc"][:-1])
        known = list(section.model_fields) if section else []
        hint = did_you_mean(str(first["loc"][-1]), known)
        return f"there is no field {where!r}.{hint} Fields there: {', '.join(known)}."
    # A field of several types has an error for each, none of which says what it may be.
    possible = dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in errors if _where(e["loc"]) == where)
    message = " or ".join(possible)
    return f"{where}: {message}, found {first['input']!r}." if where else message


def _where(location: tuple[int | str, ...]) -> str:
    """A field's dotted name, without what pydantic adds for the branches of a union (`bool`, `list[str]`)."""
    return ".".join(str(key) for key in location if not (key in ("bool", "str") or "[" in str(key)))


def _section(path: tuple[Any, ...]) -> type[BaseModel] | None:
    here: Any = Recipe
    for key in path:
        field = getattr(here, "model_fields", {}).get(key)
        here = getattr(field, "annotation", None)
        if not (isinstance(here, type) and issubclass(here, BaseModel)):
            return None
    return here
