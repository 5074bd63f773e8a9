"""Writing a finished model: bfloat16 safetensors, tokenizer or image processor, measured figures, model card."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import sklearn
import tokenizers
import torch
import transformers
from transformers import PreTrainedModel

from tunesmith.core.files import staged_folder
from tunesmith.models.pretrain.loop import Plan, Spent

FIGURES = "figures.json"
Figures = dict[str, Any]

_FRONT = """---
license: apache-2.0
library_name: transformers
pipeline_tag: {task}
---
# {name}

{summary}

Load it with `{auto}.from_pretrained(tunesmith.models.embedded.path("{name}"))`; the weights are bfloat16, so pass
`dtype=torch.float32` to train them. Made from nothing by `python -m tunesmith.models.pretrain {name}`. It is a subject
for experiments, with no use beyond them.

## Training

| | |
| --- | --- |
{training}

## Measured

All figures are those of the saved bfloat16 weights, loaded again. They are also in `{figures}`.

"""


def publish(
    model: PreTrainedModel,
    companion: Any,
    folder: Path,
    *,
    measure: Callable[[PreTrainedModel], Figures],
    render: Callable[[Figures], str],
    plan: Plan,
    spent: Spent,
    summary: str,
    task: str,
    auto: str,
) -> Figures:
    """Write the model and `companion` (tokenizer or image processor) to `folder`, measured as they are saved.

    Args:
        measure: the figures of a loaded model.
        render: those figures as the "Measured" part of the card, in Markdown.
    """
    with staged_folder(folder) as staging:
        model.to(torch.bfloat16).save_pretrained(staging)
        companion.save_pretrained(staging)
        for file in staging.iterdir():
            file.chmod(0o644)
        saved = type(model).from_pretrained(staging, dtype=torch.bfloat16)
        parameters = sum(p.numel() for p in saved.parameters())
        figures = {"name": plan.name, "parameters": parameters, **_history(plan, spent), **measure(saved)}
        (staging / FIGURES).write_text(json.dumps(figures, indent=1) + "\n")
        rows = [f"| {key} | {value} |" for key, value in _training_rows(figures)]
        front = _FRONT.format(
            name=plan.name, summary=summary, task=task, auto=auto, training="\n".join(rows), figures=FIGURES
        )
        (staging / "README.md").write_text(front + render(figures) + "\n")
    return figures


def _history(plan: Plan, spent: Spent) -> Figures:
    return {
        "steps": spent.step,
        "tokens": spent.tokens,
        "minutes": round(spent.seconds / 60, 1),
        "threads": torch.get_num_threads(),
        "seed": plan.seed,
        "learning_rate": plan.lr,
        "schedule": {"warmup": plan.warmup, "horizon": plan.horizon or plan.steps, "cooldown": plan.cooldown},
        "batch": plan.batch,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "safetensors": safetensors.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def _training_rows(figures: Figures) -> list[tuple[str, Any]]:
    rows = [("parameters", figures["parameters"]), ("steps", figures["steps"])]
    if figures["tokens"]:
        rows.append(("tokens", figures["tokens"]))
    rows += [
        ("minutes", f"{figures['minutes']} on {figures['threads']} processor thread(s)"),
        ("seed", figures["seed"]),
        ("learning rate", f"{figures['learning_rate']}; steps of {_listed(figures['schedule'])}"),
        ("batch", _listed(figures["batch"])),
        ("made with", _listed(figures["versions"])),
    ]
    return rows


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
