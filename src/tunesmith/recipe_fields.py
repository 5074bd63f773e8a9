"""The sections of a recipe: every field with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class PartSpec(Section):
    """One part and its options: `dylora`, or `{name: dylora, rank: 16}`."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(description="Slug of the part; `tunesmith catalog` lists them.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class AdapterSpec(PartSpec):
    """An adapter or prompt and where it goes."""

    target_modules: list[str] | str | None = Field(
        None, description="Layer names, a regular expression, `all-linear`, or the method's own default."
    )
    exclude_modules: list[str] | str | None = Field(
        None, description="Layer names or a regular expression to leave out."
    )
    ranks: dict[str, int] | str | None = Field(
        None,
        description="A rank per layer instead of one for all: `{layer: rank}`, or a file that `tunesmith ranks` wrote.",
    )


class ModelSpec(Section):
    """Which model, and how it is loaded."""

    name: str = Field("tiny-lm-m", description="A folder, a hub id, or an embedded model.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the loaded weights; `auto` keeps that of the checkpoint."
    )
    quantization: Literal["none", "nf4", "int8"] = Field(
        "none", description="Of the frozen base weights (bitsandbytes)."
    )
    adapter: str | None = Field(None, description="A PEFT adapter folder to merge into the model before training.")
    trust_remote_code: bool = Field(False, description="Run code that comes with a model from the hub.")

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": str(value)} if isinstance(value, str | Path) else value


class DataSpec(Section):
    """Which rows, and how they become tokens."""

    train: str | None = Field(
        None,
        description="JSONL, JSON, CSV or Parquet file, a folder saved by `datasets`, a folder of images per class, or "
        "a hub id. None: the embedded default.",
    )
    eval: str | None = Field(
        None,
        description="The same for evaluation; None takes the validation or test split of `train`, or else splits "
        "`eval_fraction` off.",
    )
    eval_fraction: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1, description="Share split off when `eval` is not given."
    )
    max_eval_rows: PositiveInt = Field(500, description="At most so many rows are split off.")
    retain: str | None = Field(
        None, description="Rows of what the model knew before, to measure forgetting; None: a set that fits the model."
    )
    columns: dict[str, str] = Field(
        default_factory=dict, description="Your names for ours, such as `{prompt: question, completion: answer}`."
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether prompt and completion go through the chat template; `auto`: only `messages` rows do.",
    )
    system: str | None = Field(None, description="A system message for rows that have none.")
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="Which tokens carry loss, where rows tell them apart."
    )
    max_length: PositiveInt = Field(1024, description="In tokens, capped by the model's own limit.")
    too_long: Literal["drop", "truncate", "error"] = Field(
        "drop", description="What happens to longer rows; always counted."
    )
    padding_free: bool | Literal["auto"] = Field(
        "auto", description="Lay rows end to end instead of padding them; `auto` where model and parts allow."
    )
    packing: bool = Field(
        False, description="Fill rows of `max_length` with several examples each; they do not see each other."
    )
    skip_bad_rows: bool = Field(
        False, description="Leave out rows that cannot be read instead of stopping; all are reported."
    )
    select: list[PartSpec] = Field(default_factory=list, description="Parts of the room `data`, in order.")
    split_seed: int = Field(0, description="Of the split into training and evaluation rows.")


class TrainSpec(Section):
    """How long, how fast, in which precision."""

    epochs: PositiveFloat | None = Field(None, description="Passes over the data; 3 if `steps` is not given either.")
    steps: PositiveInt | None = Field(None, description="Optimizer steps; overrides `epochs`.")
    batch_size: PositiveInt = Field(8, description="Rows per process and micro-batch.")
    gradient_accumulation: PositiveInt = Field(1, description="Micro-batches per optimizer step.")
    learning_rate: PositiveFloat | None = Field(
        None,
        description="Peak; None: 2e-4 with adapters or prompts, 2e-5 without (2e-3 and 5e-4 for the embedded models).",
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="Not applied to biases and normalisations.")
    lr_schedule: str = Field("linear", description="Any `lr_scheduler_type` of transformers.")
    warmup: NonNegativeFloat = Field(0.03, description="Share of the steps (below 1), or their number.")
    max_grad_norm: NonNegativeFloat = Field(1.0, description="Bound on the gradient's norm; 0 for none.")
    precision: Literal["float32", "bf16", "fp16"] = Field("float32", description="Autocast of the computation.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations in the backward pass.")
    eval_every: PositiveInt | None = Field(
        None, description="Steps between evaluations; None: eight times over the run."
    )
    save_every: PositiveInt | None = Field(
        None, description="Steps between checkpoints; None: four times over the run."
    )
    keep_checkpoints: PositiveInt = Field(2, description="How many checkpoints stay on disk.")
    log_every: PositiveInt | None = Field(
        None, description="Steps between points of the loss curve; None: a hundred points."
    )
    seed: int = Field(0, description="Of initialisation, data order and dropout.")
    threads: PositiveInt | None = Field(None, description="CPU threads; None leaves torch's choice.")
    workers: NonNegativeInt = Field(0, description="Processes that prepare batches.")
    fsdp: bool = Field(False, description="Shard weights over the processes (FSDP2).")
    torch_compile: bool = Field(False, description="Compile the model.")


class ReportSpec(Section):
    """What the report measures."""

    samples: NonNegativeInt = Field(6, description="Generated examples shown before and after.")
    generate_rows: NonNegativeInt = Field(64, description="Evaluation rows answered by generation, before and after.")
    max_new_tokens: PositiveInt = Field(96, description="Of each generated answer.")
    forgetting: bool = Field(True, description="Measure what the model knew before, before and after.")
    retain_rows: PositiveInt = Field(128, description="Rows of that measurement.")
