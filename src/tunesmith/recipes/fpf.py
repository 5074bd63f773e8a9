"""FPF and k-FPF: learn tasks one after the other, then fine-tune the modules that forget first on a small buffer.

Zhao, Zhou, Long, Jiang and Zhang, "Does Continual Learning Equally Forget All Parameters?", ICML 2023.

    stream      SGD on the tasks in turn, filling a reservoir of 200 rows; with `replay` some of it in every step (ER)
    FPF         at the end, some iterations on the reservoir, of the groups that a change of task moves most
    k-FPF       the same k times at equal distances, whatever the tasks, instead of replay
    k-FPF-KD    with the mean squared difference to the logits that the rows had when they were put in
    S_l         mean of C_l(e) in epochs after a switch over that in all others;  C_l(e) = mean |theta(e) - theta(e-1)|

The groups are those of the schedule `prone-modules`. The paper chooses normalisation layers with their statistics and
the last layer, and the first layer where the domain of the inputs changes. Models without running statistics also get
the most sensitive other groups, as far as they have been measured when a phase begins, up to `budget`.

No code was released. What the paper leaves open is ours: the form of S_l as a ratio; batches of a phase drawn without
replacement; the last of the k phases at the very end.

The loop is our own and not that of a run: the order of the stream counts, replay changes with every step, logits are
kept when a row comes by, and k phases of 60 steps would be k loads of the model. A phase can be repeated by an ordinary
run: `buffer` is a data set, and the schedule freezes the same groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from tunesmith.core.part import part
from tunesmith.core.pipeline import Pipeline, Workshop
from tunesmith.core.report import Report
from tunesmith.recipes.fpf_job import Job
from tunesmith.recipes.fpf_report import report
from tunesmith.recipes.fpf_stream import Stream
from tunesmith.recipes.fpf_tasks import By, check, split

Share = Annotated[float, Field(gt=0, le=1)]


@part(paper="arXiv:2304.04158")
class FPF(Pipeline):
    """Continual learning with forgetting-prioritised fine-tuning.

    Args:
        phases: k, how often the buffer is fine-tuned on, the last time at the end; 1 is FPF, 0 none.
        replay: Rows of the buffer that every step of the stream trains on as well (experience replay).
        buffer: Rows in the reservoir.
        tasks: How many, where classes or the rows are divided.
        by: What a task is: the rows of a `family`, some classes (`label`), or the next part of the rows (`order`);
            `auto` takes the first of these that the rows have.
        epochs: Passes over each task; `train.epochs` has no meaning here.
        iterations: Steps of a phase; not given, those of the recipe, or 60.
        phase_batch: Rows in each.
        learning_rate: Of the phases; not given, that of the stream, which is the recipe's, or 0.05.
        momentum: Of the stream's SGD; phases have an optimizer of their own without any.
        distillation: Weight of the distance to the stored logits; classification only.
        modules: Groups of `prone-modules` to fine-tune, instead of choosing.
        choose: The paper's groups (`usual`), or the most sensitive ones up to the budget (`measured`), which are the
            usual ones until a switch of task has been seen.
        budget: Share of all numbers that may be chosen by their sensitivity.
    """

    brisk: ClassVar[Mapping[str, object]] = {"tasks": 2, "epochs": 2, "buffer": 8, "phases": 2, "phase_batch": 4}

    def __init__(
        self,
        *,
        phases: NonNegativeInt = 1,
        replay: NonNegativeInt = 0,
        buffer: PositiveInt = 200,
        tasks: PositiveInt = 5,
        by: By = "auto",
        epochs: PositiveInt = 5,
        iterations: PositiveInt | None = None,
        phase_batch: PositiveInt = 32,
        learning_rate: PositiveFloat | None = None,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        distillation: NonNegativeFloat = 0.0,
        modules: list[str] | None = None,
        choose: Literal["usual", "measured"] = "usual",
        budget: Share = 0.1,
    ) -> None:
        self.phases, self.replay, self.buffer, self.count, self.by = phases, replay, buffer, tasks, by
        self.epochs, self.iterations, self.phase_batch = epochs, iterations, phase_batch
        self.learning_rate, self.momentum, self.distillation = learning_rate, momentum, distillation
        self.modules, self.choose, self.budget = modules, choose, budget

    def run(self, workshop: Workshop) -> Report:
        check(workshop.recipe, workshop.task, self.distillation)
        train = workshop.recipe["train"]
        divided = workshop.do("tasks", lambda: split(workshop.rows, workshop.held_out, self.by, self.count))
        stream = Stream(
            divided["train"],
            epochs=self.epochs,
            batch=train["batch_size"],
            buffer=self.buffer,
            replay=self.replay,
            phases=self.phases,
            seed=workshop.seed,
        )
        job = Job(self, workshop, divided, train)
        found = [workshop.do("before", job.before)]
        for steps in stream.segments():
            found.append(job.stage(f"stream-{steps[-1].number + 1}", found, partial(job.learn, steps)))
            if steps[-1].phase:
                found.append(job.stage(f"phase-{steps[-1].phase}", found, partial(job.phase, steps[-1])))
        held = steps[-1].buffer
        model = workshop.files("model", partial(job.save, found[-1]))
        workshop.files("buffer", lambda place: workshop.rows.select(held).save_to_disk(str(place)))
        return report(found, divided, stream, held, model, job.sizes())
