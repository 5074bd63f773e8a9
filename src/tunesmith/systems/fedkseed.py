"""FedKSeed: tune all weights of a model on the data of many clients, with K numbers per message whatever its size.

Qin, Chen, Qian, Ding, Li and Deng, "Federated Full-Parameter Tuning of Billion-Sized Language Models with Communication
Cost under 18 Kilobytes", ICML 2024.

    all parties        w0, and K seeds from one number
    server to client   a in R^K:   w = w0 - lr sum_j a_j z(s_j)                                       (section 3.3)
    client             steps times:  draw j;  g = (L(w + eps z) - L(w - eps z)) / (2 eps);  w -= lr g z;  h_j += g
    client to server   h in R^K:   a_j += sum_c n_c h_cj / sum_c n_c, over the clients c that answered (n_c rows)
    FedKSeed-Pro       j drawn with p = softmax(minmax(mean |h_cj|)), p sent as well                  (section 3.4)

K = 4096 numbers are 16 KiB each way. The server's log is its K numbers after each round: a server that starts again
goes on from there, and w0 with the last of them is the tuned model.

Where we differ from the released code: z comes from a generator on the CPU, the same on every device, not from the
global one of the GPU; weights are added up in float32 from w0 and rounded once; weight decay, which would have to
shrink every z too, is refused; a magnitude counts for Pro up to 1000, as there, and seeds that nobody has drawn yet
count as the mean. The numbers that clients send depend on their rows: this saves messages, and by itself keeps nothing
secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from tunesmith.core.part import part
from tunesmith.core.pipeline import Pipeline, Workshop
from tunesmith.core.report import Report
from tunesmith.errors import RecipeError
from tunesmith.systems import fedkseed_report
from tunesmith.systems.fedkseed_server import Server
from tunesmith.systems.fedkseed_split import kinds, share_out

RATE = 3e-7
Share = Annotated[float, Field(gt=0, le=1)]


@part(paper="arXiv:2312.06353")
class FedKSeed(Pipeline):
    """A federation on one machine: the rows of a recipe shared out among clients, which train in their own processes.

    Args:
        clients: N.
        share: m, of the clients that take part in a round; one at least.
        rounds: How many; 0 makes the files of clients alone, such as one client's own (`clients=1`).
        steps: tau, of a client in a round; each is two forward passes over a batch of `train.batch_size` rows.
        seeds: K.
        alpha: Of the Dirichlet distribution by which clients get rows of each class or family; small is uneven.
        learning_rate: Constant; not given, the recipe's, or 3e-7.
        eps: Size of the perturbation.
        pro: Draw seeds by what they have found so far (FedKSeed-Pro); a message to a client is then twice as large.
        weights: Clients count by their `rows`, or all `equal`.
        clip: A step whose two losses differ by more than this is left out.
        failures: Share of the answers that do not come, as a rehearsal.
        transport: `flower` simulates with Flower (`tunesmith[federated]`): clients are processes, as many at a time as
            `workers`; `here` runs them one after the other in this process; both come to the same. `network` writes
            a Flower app for real clients, which `flwr run` then runs, and says how.
        workers: Of Flower; not given, the machine's cores.
        timeout: Seconds that the server waits for the answers of a round.
        evaluate_every: Rounds from one look at the evaluation rows to the next; the last round has one.
        evaluate_rows: Of them.
    """

    brisk: ClassVar[Mapping[str, object]] = {
        "clients": 4, "share": 0.5, "rounds": 3, "steps": 3, "seeds": 8, "transport": "here", "failures": 0.3,
        "learning_rate": 1e-3, "evaluate_rows": 4,
    }  # fmt: skip

    def __init__(
        self,
        *,
        clients: PositiveInt = 200,
        share: Share = 0.05,
        rounds: NonNegativeInt = 40,
        steps: PositiveInt = 200,
        seeds: PositiveInt = 4096,
        alpha: PositiveFloat = 0.5,
        learning_rate: PositiveFloat | None = None,
        eps: PositiveFloat = 5e-4,
        pro: bool = False,
        weights: Literal["rows", "equal"] = "rows",
        clip: PositiveFloat | None = None,
        failures: Annotated[float, Field(ge=0, lt=1)] = 0.0,
        transport: Literal["flower", "here", "network"] = "flower",
        workers: PositiveInt | None = None,
        timeout: PositiveFloat = 3600.0,
        evaluate_every: PositiveInt = 1,
        evaluate_rows: PositiveInt = 64,
    ) -> None:
        self.clients, self.share, self.rounds, self.steps, self.seeds = clients, share, rounds, steps, seeds
        self.alpha, self.learning_rate, self.eps, self.pro = alpha, learning_rate, eps, pro
        self.weights, self.clip, self.failures = weights, clip, failures
        self.transport, self.workers, self.timeout = transport, workers, timeout
        self.evaluate_every, self.evaluate_rows = evaluate_every, evaluate_rows

    def run(self, workshop: Workshop) -> Report:
        rate = check(workshop.recipe, self.learning_rate)
        of = kinds(workshop.rows)
        held = workshop.do("split", lambda: share_out(of, self.clients, self.alpha, workshop.seed))
        server = Server(self, workshop, held, rate)
        before = workshop.do("before", server.before)
        if server.done < self.rounds:
            transport = server.transport()
            if steps := transport.missing():
                return fedkseed_report.waiting(steps, server.done)
            transport.run(server.work)
        model = workshop.files("model", server.save)
        workshop.files("log", server.save_log)
        return fedkseed_report.report(before, server.finished(), held, of, server.size, model)


def check(recipe: Mapping[str, Any], learning_rate: float | None) -> float:
    """The learning rate; raises `RecipeError` for what a federation does not do."""
    model, train = recipe["model"], recipe["train"]
    if model["quantization"] != "none" or model["adapter"] or model["trust_remote_code"] or recipe["prompts"]:
        raise RecipeError(
            "fedkseed tunes all weights of a plain model: run it unquantised, without code of its own, merge "
            "model.adapter into it first, and leave prompts out"
        )
    others = [spec["name"] for spec in recipe["adapters"] if spec["name"] != "lora"]
    others += [recipe[name]["name"] for name in ("schedule", "objective") if recipe[name]]
    others += [spec["name"] for spec in (*recipe["regularisers"], *recipe["inference"], *recipe["data"]["select"])]
    if recipe["optimizer"]["name"] not in ("adamw_torch", "mezo"):
        others.append(recipe["optimizer"]["name"])
    if others:
        raise RecipeError(
            f"fedkseed's clients take zeroth-order steps on the model's loss; leave out {', '.join(others)}"
        )
    if given := sorted(recipe["optimizer"].keys() - {"name"}):
        raise RecipeError(
            f"fedkseed has the options of its steps itself (`eps`, `clip`); leave optimizer.{given[0]} out"
        )
    if recipe["data"]["packing"]:
        raise RecipeError("fedkseed shares rows out among clients one by one; leave data.packing out")
    wrong = {
        "gradient_accumulation": train["gradient_accumulation"] > 1,
        "weight_decay": train["weight_decay"] > 0,
        "fsdp": train["fsdp"],
        "torch_compile": train["torch_compile"],
        "precision": train["precision"] == "fp16",
    }
    if found := [f"train.{name} {train[name]}" for name, bad in wrong.items() if bad]:
        raise RecipeError(f"fedkseed does not do {', '.join(found)}; leave it out")
    return learning_rate or train["learning_rate"] or RATE
