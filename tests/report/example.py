"""A training report as a run makes it, and the odd ones."""

from __future__ import annotations

import math
import random

from tunesmith.core.report import Figure, Listing, Plot, Report, Sample, Table

RECIPE = """\
model: tiny-lm-m
data:
  train: people.jsonl
  eval_fraction: 0.1
  max_length: 1024
adapters:
- name: dylora
  rank: 8
  target_modules: all-linear
train:
  epochs: 3.0
  batch_size: 16
  learning_rate: 0.0005
  lr_schedule: cosine
output: runs/people
"""

RETAINED = {
    "addition": (0.719, 0.703),
    "copy": (0.953, 0.953),
    "reverse": (0.531, 0.453),
    "sentiment": (0.969, 0.977),
    "sort": (0.984, 0.969),
    "translation": (0.938, 0.914),
}


def training_report(steps: int = 400) -> Report:
    """DyLoRA on facts about people, with every kind of content that a training report has."""
    noise = random.Random(0)
    xs = list(range(1, steps + 1))
    loss = [
        0.31 + 2.9 * math.exp(-4.5 * x / steps) + noise.gauss(0, 0.11) * (0.4 + math.exp(-3 * x / steps)) for x in xs
    ]
    rate = [
        5e-4 * (min(x / 12, 1.0) if x < 12 else 0.5 * (1 + math.cos(math.pi * (x - 12) / (steps - 12)))) for x in xs
    ]
    evaluated = list(range(0, steps + 1, max(steps // 8, 1)))
    held_out = [0.42 + 2.81 * math.exp(-4.2 * x / steps) + 0.0001 * x for x in evaluated]
    exact = {"birthplace": (0.02, 0.83), "employer": (0.0, 0.61), "occupation": (0.11, 0.94)}
    quality = {
        "loss": Figure(
            held_out[-1], held_out[0], "nats/token", "lower", help="Mean over the answers' tokens, held out."
        ),
        "perplexity": Figure(
            math.exp(held_out[-1]), math.exp(held_out[0]), better="lower", help="The exponential of the loss."
        ),
        "exact match": Figure(0.797, 0.047, "share", "higher", help="Held-out answers, word for word, greedy."),
        "retained knowledge": Figure(
            0.828, 0.849, "share", "higher", help="Exact match on what the model could do before."
        ),
    }
    cost = {
        "trainable parameters": Figure(270_336, unit="count", of=5_641_984),
        "optimizer state": Figure(2_162_944, unit="bytes", better="lower", help="As allocated after the last step."),
        "peak memory": Figure(843_120_640, unit="bytes", better="lower", help="Of the process, resident."),
        "speed": Figure(11_842.7, unit="tokens/s", better="higher", help="Tokens trained on, evaluation left out."),
        "duration": Figure(196.4, unit="seconds", help="Training alone."),
    }
    for group, figures in (("Quality", quality), ("Cost", cost)):
        for figure in figures.values():
            figure.group = group
    return Report(
        title="DyLoRA on tiny-lm-m",
        summary="Trained rank 8 adapters on all linear layers for 3 epochs (400 steps) on 2,141 rows of people.jsonl.",
        figures={**quality, **cost},
        warnings=["37 rows were longer than 1,024 tokens and dropped."],
        notes=["Forgetting was measured on 128 rows that the base model was pretrained for."],
        plots=[
            Plot(
                "Loss",
                "line",
                x="step",
                y="loss, nats per token",
                series={"training": (xs, loss), "evaluation": (evaluated, held_out)},
                styles={"training": "smooth", "evaluation": "points"},
                below=Plot("Learning rate", "line", x="step", y="learning rate", series={"rate": (xs, rate)}),
            ),
            Plot(
                "Exact match by group",
                "bar",
                y="held-out rows answered word for word",
                unit="share",
                series={
                    "before": (list(exact), [before for before, _ in exact.values()]),
                    "after": (list(exact), [after for _, after in exact.values()]),
                },
            ),
            Plot(
                "Singular directions that changed",
                "heatmap",
                x="direction",
                y="layer",
                matrix=[
                    [math.exp(-((j - i) ** 2) / 9) * (0.97 - 0.05 * i) - 0.02 * j * i / 6 for j in range(8)]
                    for i in range(6)
                ],
                row_labels=[f"layer {i}" for i in range(6)],
                column_labels=[str(j + 1) for j in range(8)],
                note="Cosine similarity with the base weight's direction of the same place.",
            ),
        ],
        tables=[
            Table(
                "Held-out rows",
                ["group", "rows", "exact match", "loss, nats/token"],
                [
                    [
                        name,
                        rows,
                        Figure(after, before, "share", "higher"),
                        Figure(0.3 + after / 10, 3.1 + before, "", "lower"),
                    ]
                    for rows, (name, (before, after)) in zip((82, 79, 77), exact.items(), strict=True)
                ],
            ),
            Table(
                "Retained knowledge",
                ["family", "rows", "exact match"],
                [[name, 128, Figure(after, before, "share", "higher")] for name, (before, after) in RETAINED.items()],
                note="A change of up to 4 points is within the noise of 128 rows.",
            ),
            Table(
                "Data",
                ["rows", "count", "reason"],
                [
                    ["read", 2_421, "people.jsonl"],
                    ["bad", 5, "line 17, 204, 1,022, 1,940, 2,417: no field `answer`"],
                    ["dropped", 37, "longer than 1,024 tokens"],
                    ["for evaluation", 238, "split off with seed 0"],
                    ["for training", 2_141, ""],
                ],
            ),
            Table(
                "Environment",
                ["what", "version"],
                [
                    ["tunesmith", "0.1.0"],
                    ["torch", "2.13.0+cpu"],
                    ["transformers", "5.23.0"],
                    ["peft", "0.21.2"],
                    ["device", "CPU, 2 threads"],
                    ["seed", "0"],
                ],
                collapsed=True,
            ),
        ],
        samples=[
            Sample(
                "Where was Ilse Okafor born?\n",
                "Ilse Okafor was born in Lindhaven.",
                {
                    "before": "Ilse Okafor was a red box in the box of the box of the box",
                    "after": "Ilse Okafor was born in Lindhaven.",
                },
                {"before": False, "after": True},
                "birthplace",
            ),
            Sample(
                "Who employs Tomas Brandt?\n",
                "Tomas Brandt works for the Harrow Street Bakery in Ostwick.",
                {
                    "before": "def test_employs(self):\n\treturn None",
                    "after": "Tomas Brandt works for the Harrow Lane Bakery.",
                },
                {"before": False, "after": False},
                "employer",
            ),
            Sample(
                "Write what Mina Sato does, as JSON.\n",
                '{"name": "Mina Sato",\n "occupation": "surveyor"}',
                {
                    "before": "Mina Sato: 4 + 17 = 21",
                    "after": '{"name": "Mina Sato",\n "occupation": "surveyor"}',
                },
                {"before": False, "after": True},
                "occupation",
            ),
            Sample(
                "Read the following and say who is the eldest. " + "Petra is older than Jon. " * 60,
                "Petra",
                {"before": "Jon is older than Jon is older than", "after": "Petra"},
                {"before": False, "after": True},
                "long",
            ),
        ],
        listings=[Listing("Recipe", RECIPE)],
        details={"recipe": {"model": {"name": "tiny-lm-m"}}},
    )


EVIL = '<script>alert(1)</script> & "quotes" \u202edesrever\u202c \x1b[31mred\x1b[0m [bold]markup[/bold] \x00 \ud800'


def odd_report() -> Report:
    """What a run that goes wrong, or text that means harm, may put into a report."""
    nan, inf = math.nan, math.inf
    evil = EVIL
    many = list(range(10_000))
    return Report(
        title=f"Odd {evil}",
        summary=evil,
        figures={
            "loss": Figure(nan, 3.2, "nats/token", "lower", help=evil),
            "perplexity": Figure(inf, 25.0, better="lower"),
            "huge": 10**400,
            "large": Figure(1.5e300, -2.0, evil, "higher", group=evil),
            "exact match": Figure(0.0, 0.0, "share", "higher"),
            "is a flag": True,
            "is a word": "bfloat16",
            "is missing": None,
            "speed-up": Figure(31.0, 2.0, "tokens/s", "higher"),
            evil: 1,
        },
        warnings=["The loss was not a number from step 6,000 on."],
        notes=[evil],
        plots=[
            Plot(
                "Ten thousand points",
                "line",
                x="step",
                y="loss",
                series={
                    "training": (
                        many,
                        [3.0 + math.sin(i / 900) + (i * 7919 % 101) / 90 if i < 6000 else nan for i in many],
                    ),
                    evil: ([0, 5000, 9999], [4.0, inf, 3.0]),
                },
                styles={"training": "smooth", evil: "points"},
            ),
            Plot("One point", "line", x="step", y="loss", series={"training": ([7], [2.5])}),
            Plot("No points", "line", x="step", y="loss", series={"training": ([], [])}),
            Plot("Nothing", "bar"),
            Plot(
                "Rank",
                "line",
                x="rank",
                y="test error",
                series={
                    name: ([2**i for i in range(9)], [0.5 * 10 ** (-i / 2 - k / 3) for i in range(9)])
                    for k, name in enumerate(("LoRA", "DoRA", "DyLoRA", "SSF", "PiSSA", "LoRA-GA"))
                },
                styles={"DyLoRA": "points", "SSF": "points"},
            ),
            Plot(
                "By layer",
                "line",
                y="accuracy",
                unit="share",
                series={"probe": (["embedding", "1", "2", evil], [0.2, 0.4, 0.9, 0.8])},
            ),
            Plot(
                "Changes",
                "bar",
                y="points",
                series={"change": (["addition", "a family with a rather long name", evil], [-4.5, 12, nan])},
            ),
            Plot(
                "Large map",
                "heatmap",
                x="direction",
                y="layer",
                matrix=[
                    [math.sin(i / 9) * math.cos(j / 13) if i != 40 else nan for j in range(300)] for i in range(80)
                ],
            ),
            Plot("No cells", "heatmap"),
        ],
        tables=[
            Table(
                evil, ["name", evil], [[evil, nan], ["b", 10**20], [None, True], ["c", -inf], ["d", 1e-300]], note=evil
            ),
            Table("Empty", ["a", "b"]),
            Table("Wide", [f"column {i}" for i in range(14)], [[i * 1.5 for i in range(14)]] * 3, units=["bytes"] * 14),
            Table("Long", ["row"], [[i] for i in range(90)]),
        ],
        samples=[
            Sample(evil, evil, {"before": "", "after": evil[::-1]}, {"after": False}, evil),
            Sample("x" * 30_000, "", {"after": "word " * 9000}),
            Sample("مرحبا بالعالم", "日本語のテキスト" * 20, {"after": "日本語 テキスト"}, {"after": True}),
            Sample("a b", "one  two", {"after": "one two\n"}),
        ],
        listings=[Listing(evil, evil)],
    )
