"""The report of FedKSeed: how the loss went, what was sent, who has which rows."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.core.report import Figure, Plot, Report, Table


def waiting(steps: Sequence[str], done: int) -> Report:
    """Of a federation over the network, before or between the runs of its server."""
    figures: dict[str, Any] = {"rounds that are done": Figure(done, None, "count")}
    return Report("FedKSeed: to go on, start its parties", figures, notes=list(steps))


def report(
    before: Mapping[str, Any],
    rounds: Sequence[Mapping[str, Any]],
    held: Sequence[Sequence[int]],
    of: Sequence[Hashable],
    size: int,
    model: Path,
) -> Report:
    """What came of the rounds.

    Args:
        before: Evaluation before the first round.
        rounds: The numbers of each.
        held: Rows of each client.
        of: The kind of each row.
        size: Bytes of all weights that are tuned.
        model: Where the tuned one is.
    """
    looked = [(n + 1, made) for n, made in enumerate(rounds) if "loss" in made]
    last = looked[-1][1] if looked else before
    down, up = ([n for made in rounds for n in made[way]] for way in ("down", "up"))
    lost = sum(len(made["missing"]) for made in rounds)
    asked = sum(len(made["asked"]) for made in rounds)
    figures: dict[str, Any] = {
        "loss": Figure(last["loss"], before["loss"], "nats", "lower", group="evaluation", help="Per label."),
    }
    if "accuracy" in last:
        figures["accuracy"] = Figure(last["accuracy"], before["accuracy"], "share", "higher", group="evaluation")
    each = "Largest message of a round, with Flower's envelope where Flower carried it."
    figures |= {
        "to a client": Figure(max(down, default=0), None, "bytes", "lower", of=size, help=each, group="messages"),
        "from a client": Figure(max(up, default=0), None, "bytes", "lower", of=size, help=each, group="messages"),
        "all messages": Figure(sum(down) + sum(up), None, "bytes", "lower", group="messages"),
        "sending all weights instead": Figure(
            2 * size * len(up), None, "bytes", help="Both ways, for as many answers.", group="messages"
        ),
        "answers that did not come": Figure(lost, None, "count", "lower", of=asked, group="messages"),
        "directions drawn by clients to catch up": Figure(
            sum(made["drawn"] for made in rounds), None, "count", "lower", group="cost",
            help="Passes over all weights, shared by clients in one process, beside two forward passes per step.",
        ),
        "steps without an update": Figure(sum(made["skipped"] for made in rounds), None, "count", group="cost"),
    }  # fmt: skip
    trained = [(n + 1, made["client loss"]) for n, made in enumerate(rounds) if made["client loss"] is not None]
    series = {
        "evaluation rows": ([0, *(n for n, _ in looked)], [before["loss"], *(made["loss"] for _, made in looked)])
    }
    if trained:
        series["clients, while they train"] = ([n for n, _ in trained], [loss for _, loss in trained])
    plots = [Plot("Loss", "line", "round", "nats", series)]
    kinds = sorted(set(of), key=str)
    if len(kinds) > 1:
        shares = [[sum(of[i] == kind for i in rows) / len(rows) for kind in kinds] for rows in held[:40]]
        plots.append(
            Plot(
                "Rows of the clients", "heatmap", "class or family", "client",
                matrix=shares, row_labels=[str(i) for i in range(len(shares))], column_labels=[str(k) for k in kinds],
                unit="share", note="The first 40 clients." if len(held) > 40 else "",
            )
        )  # fmt: skip
    table = Table(
        "Rounds", ["round", "asked", "answered", "to each", "from each", "clients' loss", "loss"], collapsed=True
    )
    table.units = ["", "count", "count", "bytes", "bytes", "nats", "nats"]
    for n, made in enumerate(rounds):
        ways = [max(made[way], default=None) for way in ("down", "up")]
        answered = len(made["asked"]) - len(made["missing"])
        table.rows.append([n + 1, len(made["asked"]), answered, *ways, made["client loss"], made.get("loss")])
    return Report(
        f"FedKSeed: {len(held)} clients, {len(rounds)} rounds; the model is in {model}", figures, [table], plots
    )
