"""LoRA training speed against what people use: TRL's SFTTrainer with PEFT, on its defaults and with packing.

    python benchmarks/train.py                  # both models, five interleaved repetitions: about forty minutes
    python benchmarks/train.py --model tiny-lm-m --repetitions 1
    python benchmarks/train.py --profile ours   # where the time of one run goes

Every run is a process of its own (so that peak memory is its own) and trains one pass over the same rows with the same
LoRA, batch size, learning rate, precision and threads. Counted are real tokens per second of training, padding left
out; the peak of resident memory while training; and the loss on all rows afterwards, computed the same way for all.
Medians over the repetitions go to `benchmarks/results/train.json` and `train.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
CONTENDERS = {
    "trl": "TRL, its defaults",
    "trl packing": "TRL, packing",
    "ours": "Tunesmith, its defaults",
    "ours packing": "Tunesmith, packing",
}
MODELS = {"tiny-lm-m": "tiny-lm-m, 5 M", "llama-50m": "random Llama, 50 M"}
BATCH, MAX_LENGTH, RANK, LEARNING_RATE = 8, 512, 8, 2e-4
ROWS = {"tiny-lm-m": 256, "llama-50m": 64}


def make_model(name: str) -> Any:
    """The base model in bfloat16, the same in every process."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tunesmith.models.loader import load_base, resolve

    if name == "tiny-lm-m":
        return load_base(resolve(name), "causal-lm", dtype="bfloat16")
    torch.manual_seed(0)
    size = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = LlamaConfig(vocab_size=32_000, **size, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1)
    return LlamaForCausalLM(config).to(torch.bfloat16)


def make_rows(name: str, vocabulary: int) -> list[dict[str, list[int]]]:
    """Instruction rows of mixed length, 16 to 500 tokens, as ids: three parts prompt, two parts completion.

    The ids are random, so that both stacks train on exactly the same tokens whatever their tokenisation.
    """
    rng = random.Random(0)
    rows = []
    for _ in range(ROWS[name]):
        length = round(2 ** rng.uniform(4, 8.966))
        ids = [rng.randrange(3, vocabulary) for _ in range(length)]
        cut = max(int(length * 0.6), 1)
        rows.append({"input_ids": ids, "labels": [-100] * cut + ids[cut:]})
    return rows


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")


class Clock:
    """Seconds between the first step's begin and the last step's end, and the memory peak in between."""

    def __init__(self) -> None:
        from transformers import TrainerCallback

        class Timer(TrainerCallback):
            def on_train_begin(timer, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: N805
                Path("/proc/self/clear_refs").write_text("5")
                self.began = time.perf_counter()

            def on_train_end(timer, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: N805
                self.seconds = time.perf_counter() - self.began
                status = Path("/proc/self/status").read_text()
                self.peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024

        self.began = self.seconds = 0.0
        self.peak = 0
        self.callback = Timer()


def trainer_of(contender: str, model: Any, rows: list[dict[str, list[int]]], clock: Clock, folder: str) -> Any:
    """The contender's trainer, ready to train."""
    from datasets import Dataset

    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": BATCH,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "bf16": True,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1000,
        "seed": 0,
    }
    if contender.startswith("trl"):
        from trl import SFTConfig, SFTTrainer

        packing = contender.endswith("packing")
        masks = [{"input_ids": r["input_ids"], "completion_mask": [int(x != -100) for x in r["labels"]]} for r in rows]
        config = SFTConfig(**common, packing=packing, max_length=MAX_LENGTH, gradient_checkpointing=False)
        return SFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list(masks),
            processing_class=_tokenizer(),
            peft_config=lora(),
            callbacks=[clock.callback],
        )
    return _ours(contender, model, rows, clock, common)


def _ours(contender: str, model: Any, rows: list[dict[str, list[int]]], clock: Clock, common: dict[str, Any]) -> Any:
    import transformers
    from datasets import Dataset
    from peft import get_peft_model

    from tunesmith.core import packing
    from tunesmith.core.trainer import TrainerMixin
    from tunesmith.inputs.batches import pack
    from tunesmith.objectives.sft import SFT

    class Trainer(TrainerMixin, transformers.Trainer):
        pass

    model = get_peft_model(model, lora())
    packing.enable(model)
    dataset = Dataset.from_list(rows)
    if contender.endswith("packing"):
        dataset, _ = pack(dataset, MAX_LENGTH, Path(common["output_dir"]))
    return Trainer(
        model=model,
        args=transformers.TrainingArguments(**common, remove_unused_columns=False),
        train_dataset=dataset,
        data_collator=packing.Flatten(),
        objective=SFT(),
        callbacks=[clock.callback],
    )


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from tunesmith.models import embedded

    return AutoTokenizer.from_pretrained(embedded.path("tokenizer"))


def final_loss(model: Any, rows: list[dict[str, list[int]]]) -> float:
    """Mean -log p per label over all rows, one row at a time, in float32."""
    import torch
    import torch.nn.functional as F

    model = model.float().eval()
    total = count = 0.0
    for row in rows[:64]:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def leak(trainer: Any) -> float:
    """The largest difference that a row's batch companions make to its logits, in the batches this trainer makes.

    The first batch that holds two rows in one sequence (or else the first) is run as it is, and again with every token
    of one row replaced: what changes in the logits of other rows is a leak.
    """
    import torch

    model = trainer.model.float().eval()
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    batch = next((b for b in batches if _joined(b)), batches[0])
    own = _joined(batch) or _rows_of(batch)[0]
    others = [place for place in _rows_of(batch) if place != own]
    batch = {k: v for k, v in batch.items() if k not in ("labels", "completion_mask")}
    sequence, start, stop = own
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][sequence, start:stop] = torch.arange(3, 3 + stop - start) % 1000 + 3
    with torch.no_grad():
        before, after = model(**batch).logits, model(**changed).logits
    difference = (before - after).abs()
    assert float(difference[sequence, start:stop].max()) > 0
    return max(float(difference[n, i:j].max()) for n, i, j in others)


def _rows_of(batch: dict[str, Any]) -> list[tuple[int, int, int]]:
    """(sequence, first, one past the last token) of every row that a batch holds, padding left out."""
    found = []
    for n, ids in enumerate(batch["input_ids"]):
        if "position_ids" in batch:
            starts = [*(batch["position_ids"][n] == 0).nonzero().flatten().tolist(), len(ids)]
        else:
            starts = [0, int(batch["attention_mask"][n].sum())]
        found += [(n, i, j) for i, j in pairwise(starts) if j > i]
    return found


def _joined(batch: dict[str, Any]) -> tuple[int, int, int] | None:
    """The first row that another one follows in the same sequence."""
    rows = _rows_of(batch)
    return next((row for row, after in pairwise(rows) if row[0] == after[0]), None)


def work(contender: str, name: str, check_leak: bool) -> dict[str, float]:
    """One measured run, in this process."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = make_model(name)
    rows = make_rows(name, model.config.vocab_size)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(contender, model, rows, clock, folder)
        found: dict[str, float] = {}
        if check_leak:
            found["leak"] = leak(trainer)
            return found
        trainer.train()
        tokens = sum(len(row["input_ids"]) for row in rows)
        found |= {"tokens_per_second": tokens / clock.seconds, "seconds": clock.seconds, "peak_bytes": clock.peak}
        found |= {"steps": trainer.state.global_step, "final_loss": final_loss(trainer.model, rows)}
    return found


def run_one(contender: str, name: str, check_leak: bool = False) -> dict[str, float]:
    """One measured run, in a process of its own."""
    flags = ["--worker", contender, "--model", name, *(["--leak"] if check_leak else [])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{contender} on {name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def profile(contender: str, name: str) -> None:
    """Where the time of a run goes, by operator."""
    import torch
    from torch.profiler import ProfilerActivity

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    model = make_model(name)
    rows = make_rows(name, model.config.vocab_size)[: 4 * BATCH]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(contender, model, rows, Clock(), folder)
        with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as found:
            trainer.train()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def table(results: dict[str, Any]) -> str:
    """The medians as Markdown, with ratios to TRL with packing and to TRL's defaults."""
    lines = ["# LoRA training, against TRL and PEFT", "", "Made by `python benchmarks/train.py`.", ""]
    for name, runs in results["runs"].items():
        median: Callable[[str, str], float] = lambda c, key, runs=runs: statistics.median(r[key] for r in runs[c])  # noqa: E731
        lines += [
            f"## {MODELS[name]}",
            "",
            "| | tokens/s | to TRL's defaults | to TRL packing | peak memory | steps | final loss | rows leak |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        base, packed = median("trl", "tokens_per_second"), median("trl packing", "tokens_per_second")
        for contender, label in CONTENDERS.items():
            speed, peak = median(contender, "tokens_per_second"), median(contender, "peak_bytes") / 1e6
            leaked = results["leaks"][name][contender]
            lines.append(
                f"| {label} | {speed:,.0f} | {speed / base:.2f} | {speed / packed:.2f} | {peak:,.0f} MB | "
                f"{median(contender, 'steps'):.0f} | {median(contender, 'final_loss'):.4f} | "
                f"{'yes, ' if leaked > 1e-4 else 'no, '}{leaked:.1e} |"
            )
        lines.append("")
    lines.append(f"{results['repetitions']} interleaved repetitions, medians; {results['environment']}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--profile", choices=CONTENDERS)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--leak", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    names = given.model or list(MODELS)
    if given.worker:
        print(json.dumps(work(given.worker, names[0], given.leak)))
        return
    if given.profile:
        profile(given.profile, names[0])
        return
    runs: dict[str, dict[str, list[dict[str, float]]]] = {n: {c: [] for c in CONTENDERS} for n in names}
    leaks = {n: {c: run_one(c, n, check_leak=True)["leak"] for c in CONTENDERS} for n in names}
    for repetition in range(given.repetitions):
        for name in names:
            for contender in CONTENDERS:
                found = run_one(contender, name)
                runs[name][contender].append(found)
                print(f"{repetition + 1}: {name}, {contender}: {found['tokens_per_second']:,.0f} tokens/s", flush=True)
    import platform
    from importlib.metadata import version

    libraries = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "trl", "peft"))
    threads = os.environ.get("OMP_NUM_THREADS", "2")
    environment = f"{platform.machine()}, {threads} threads, bfloat16, batch {BATCH}, {libraries}"
    results = {"runs": runs, "leaks": leaks, "repetitions": given.repetitions, "environment": environment}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "train.json").write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "train.md").write_text(table(results))
    print(table(results))


if __name__ == "__main__":
    main()
