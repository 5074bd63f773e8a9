"""FedKSeed: replay, bytes and restarts exactly; digits rolled by a pixel, on eight clients of uneven classes."""

from __future__ import annotations

import copy
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import tunesmith
from tunesmith import world
from tunesmith.core.directions import Directions
from tunesmith.core.meters import grad_bytes, saved_bytes
from tunesmith.core.seeds import generator, seed_of, subset
from tunesmith.evidence import kit_digits as kit
from tunesmith.evidence.claim import Check, Claim, Figures
from tunesmith.optimizers.mezo import MeZO
from tunesmith.systems.fedkseed_client import MODEL, Client, choices, local_steps, save_rows
from tunesmith.systems.fedkseed_server import added, chances, note
from tunesmith.systems.fedkseed_space import SeedSpace, candidates, packed, unpacked
from tunesmith.systems.fedkseed_split import share_out

CLIENTS, EACH, ROUNDS, STEPS, K, ROWS, EPS, ALPHA = 8, 4, 20, 20, 128, 32, 1e-3, 0.5
RATES = (5e-4, 1.5e-3, 5e-3)

CLAIM = Claim(
    "fedkseed",
    says="Full-parameter tuning of language models by many clients with less than 18 kilobytes of communication per "
    "round, better on average than federated tuning of adapters in six settings.",
    where="abstract; sections 3.3 and 3.4",
    ran="Identities and bytes on small Llamas. Then a residual MLP of 1,754 numbers, pretrained on scikit-learn's "
    "digits, moved to digits that are rolled by one pixel: 8 clients with classes by Dirichlet 0.5, 4 in each of 20 "
    "rounds, 20 steps of 32 rows, 128 seeds; FedKSeed, FedKSeed-Pro, and each client alone by MeZO with the 200 steps "
    "that it takes in the federation on average. Each has the same three learning rates, chosen by the loss on "
    "validation rows of all classes; losses are those of test rows.",
    not_held="FedKSeed-Pro is 12 % of the fall better than uniform draws with one seed, and 9 and 5.1 % worse with the "
    "others (losses 0.85, 1.07 and 0.87 against 0.94, 1.00 and 0.82, from 1.70 to 1.95 before): three seeds of this "
    "size tell no difference, and the median misses the threshold by a hair. Probably little is to be had here: its "
    "softmax of numbers in [0, 1] makes no seed more than e times as likely as another, and in 20 rounds of 80 steps "
    "over 128 seeds each magnitude is the mean of a dozen noisy slopes, older ones from where the loss was higher.",
)


def llama(width: int = 32, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama of two blocks."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return kit.seeded(lambda: LlamaForCausalLM(config), seed).eval()


def _ids(number: int) -> dict[str, Tensor]:
    ids = torch.randint(64, (2, 12), generator=generator("fedkseed", "ids", number))
    return {"input_ids": ids, "labels": ids}


def _loss(model: nn.Module) -> Callable[[int], Tensor]:
    return lambda step: model(**_ids(step % 8)).loss


def _weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _apart(a: nn.Module, b: nn.Module) -> float:
    return float((_weights(a) - _weights(b)).abs().max())


# Exact ----------------------------------------------------------------------------------------------------------------


@CLAIM.exact
def scalars_are_the_run() -> list[Check]:
    """A client's 40 steps over 8 seeds are rebuilt from its 8 numbers, in any order of the seeds."""
    model, again, shuffled = llama(), llama(), llama()
    start, seeds = _weights(model), candidates(0, 8)
    chosen = choices(8, 40, None, "fedkseed", "claim")
    found = local_steps(SeedSpace(model, seeds, 1e-3), _loss(model), chosen, eps=EPS).found
    SeedSpace(again, seeds, 1e-3).go(found)
    order = torch.randperm(8, generator=generator("fedkseed", "order"))
    SeedSpace(shuffled, [seeds[i] for i in order.tolist()], 1e-3).go(found[order])
    return [
        Check("largest difference, rebuilt and trained", _apart(again, model), "<=", 1e-5),
        Check("the same, seeds shuffled and not", _apart(shuffled, again), "<=", 1e-5),
        Check("largest change of a weight", float((_weights(model) - start).abs().max()), ">=", 1e-3),
    ]


@CLAIM.exact
def one_client_is_mezo() -> Check:
    """One client that takes MeZO's seeds in turn goes MeZO's way, bit for bit."""
    model, other = llama(), llama()
    seeds = [seed_of(0, "mezo", step, 0) for step in range(30)]
    local_steps(SeedSpace(model, seeds, 1e-3), _loss(model), range(30), eps=EPS)
    optimizer, loss = MeZO(list(other.parameters()), lr=1e-3, eps=EPS, seed=0, noise="cpu"), _loss(other)
    for step in range(30):
        optimizer.step(lambda step=step: loss(step))
    return Check("largest difference of a weight", _apart(model, other), "==", 0.0)


@CLAIM.exact
def what_is_learnt_is_in_the_span() -> list[Check]:
    """w - w0 is a sum of the K vectors, and needs all of them (least squares, K = 6)."""
    model = llama()
    start, seeds = _weights(model), candidates(1, 6)
    local_steps(SeedSpace(model, seeds, 1e-3), _loss(model), [i % 6 for i in range(24)], eps=EPS)
    moved = (_weights(model) - start).double()[:, None]
    zero = copy.deepcopy(model)
    columns = []
    for seed in seeds:
        nn.utils.vector_to_parameters(torch.zeros_like(start), zero.parameters())
        Directions([{"params": list(zero.parameters())}], noise="cpu").add_(seed, 1.0)
        columns.append(_weights(zero).double())
    Z = torch.stack(columns, 1)

    def residual(Z: Tensor) -> float:
        return float((moved - Z @ torch.linalg.lstsq(Z, moved).solution).norm() / moved.norm())

    least = min(residual(Z[:, [i for i in range(6) if i != out]]) for out in range(6))
    return [
        Check("residual / change", residual(Z), "<=", 1e-5),
        Check("the same, least without one of the vectors", least, ">=", 1e-2),
    ]


@CLAIM.exact
def messages_have_k_numbers() -> list[Check]:
    """Bytes of serialised messages at K = 4096, for two sizes of model; a client keeps nothing for a backward pass."""
    k, sent, answers, whole, kept = 4096, [], [], [], 0
    for width in (32, 128):
        model = llama(width)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            model.save_pretrained(folder / MODEL)
            save_rows([_ids(0)], 2, folder / "rows-0.safetensors")
            client = Client(folder)
            space = SeedSpace(client.model, candidates(0, k), 1e-6)
            about = {"client": 0, "round": 0, "master": 0, "base": space.base, "lr": 1e-6, "eps": 5e-4}
            more = {"steps": 5, "clip": None, "failures": 0.0}
            sums = torch.zeros(k)
            sums[::500] = torch.randn(9, generator=generator("fedkseed", "sums"))
            pro = packed({"sums": sums, "chances": torch.full((k,), 1 / k)}, {**about, **more})
            sent.append((len(packed({"sums": sums}, {**about, **more})), len(pro)))
            with saved_bytes(client.model) as saved, grad_bytes(client.model) as grads:
                answer = client.answer(pro)
            live = sum(p.grad is not None for p in client.model.parameters())
        kept += saved.bytes + grads.bytes + live
        answers.append((len(answer), unpacked(answer)[0]["found"].nbytes))
        whole.append(len(save({n: p.detach().clone() for n, p in model.named_parameters()})))
    return [
        Check("bytes to a client, larger model", sent[1][0], "<=", 18_000),
        Check("bytes from a client, larger model", answers[1][0], "<=", 18_000),
        Check("numbers from a client / K", answers[1][1] / (4 * k), "==", 1.0),
        Check("bytes to a client, Pro", sent[1][1], "<=", 36_000),
        Check("larger model - smaller, bytes to a client", sent[1][0] - sent[0][0], "==", 0),
        Check("larger model / smaller, bytes from a client", answers[1][0] / answers[0][0], "<=", 1.001),
        Check("larger model / smaller, bytes of all weights (FedAvg)", whole[1] / whole[0], ">=", 8),
        Check("bytes of all weights / to a client, larger model", whole[1] / sent[1][0], ">=", 30),
        Check("bytes saved for a backward pass and of gradients", kept, "==", 0),
    ]


@CLAIM.exact
def a_server_goes_on_from_its_log() -> list[Check]:
    """A server that was lost after the second of four rounds ends with the same bits."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        world.dataset(["sort"], 40, split="train", seed=0).to_json(str(folder / "rows.jsonl"))
        options = {"clients": 4, "share": 0.5, "rounds": 4, "steps": 2, "seeds": 16, "pro": True, "evaluate_rows": 4}
        recipe = {
            "model": {"name": "tiny-lm-s"},
            "data": {"train": str(folder / "rows.jsonl")},
            "output": str(folder / "out"),
            "train": {"learning_rate": 1e-4, "batch_size": 1},
        }
        tunesmith.pipeline("fedkseed", recipe, transport="here", **options)
        before = {f: load_file(folder / "out" / f) for f in ("model/model.safetensors", "log/sums.safetensors")}
        for gone in ("model", "log", "rounds/00002", "rounds/00003"):
            shutil.rmtree(folder / "out" / gone)
        for stage in ("round-2", "round-3"):
            (folder / "out" / "stages" / f"{stage}.json").unlink()
        tunesmith.pipeline("fedkseed", recipe, resume=True, transport="here", **options)
        after = {f: load_file(folder / "out" / f) for f in before}
        start = load_file(folder / "out" / "federation" / MODEL / "model.safetensors")
    differ = sum(not torch.equal(t, after[f][n]) for f, held in before.items() for n, t in held.items())
    moved = sum(not torch.equal(t, start[n]) for n, t in before["model/model.safetensors"].items())
    return [
        Check("tensors that differ", differ, "==", 0),
        Check("tensors that the rounds changed", moved, ">=", 1),
    ]


# Comparison -----------------------------------------------------------------------------------------------------------


def _score(model: nn.Module, rows: kit.Rows) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(kit.logits(model, rows[0]), rows[1]))


def _batch(rows: kit.Rows, own: Sequence[int], g: torch.Generator) -> kit.Rows:
    chosen = torch.tensor(own)[torch.randint(len(own), (ROWS,), generator=g)]
    return rows[0][chosen], rows[1][chosen]


def federate(
    start: nn.Module, rows: kit.Rows, held: Sequence[Sequence[int]], seed: int, lr: float, *, pro: bool
) -> nn.Module:
    """All rounds of a federation."""
    space = SeedSpace(copy.deepcopy(start), candidates(seed, K), lr)
    sums, magnitudes, times = torch.zeros(K), torch.zeros(K), torch.zeros(K)
    for turn in range(ROUNDS):
        p, found = chances(magnitudes, times) if pro else None, {}
        for client in subset(CLIENTS, EACH, seed, "clients", turn):
            space.go(sums)
            g = generator(seed, "rows", turn, client)
            batches = [_batch(rows, held[client], g) for _ in range(STEPS)]
            chosen = choices(K, STEPS, p, seed, "seeds", turn, client)
            found[client] = local_steps(
                space,
                lambda step, batches=batches: F.cross_entropy(space.model(batches[step][0]), batches[step][1]),
                chosen,
                eps=EPS,
            ).found
        sums = added(sums, found, {c: float(len(held[c])) for c in found})
        note(magnitudes, times, found)
    space.go(sums)
    return space.model


def alone(start: nn.Module, rows: kit.Rows, own: Sequence[int], seed: int, lr: float) -> nn.Module:
    """As many steps of MeZO on one client's rows as it takes in a federation on average."""
    model, g = copy.deepcopy(start), generator(seed, "alone")
    optimizer = MeZO(list(model.parameters()), lr=lr, eps=EPS, seed=seed, noise="cpu")
    for _ in range(ROUNDS * STEPS * EACH // CLIENTS):
        x, y = _batch(rows, own, g)
        optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
    return model


def _best(run: Callable[[float], nn.Module], data: kit.Digits) -> tuple[nn.Module, float]:
    return kit.search(run, RATES, lambda model: -_finite(_score(model, data.validation)))


def _finite(loss: float) -> float:
    return loss if loss == loss else float("inf")


@CLAIM.comparison
def rolled_digits(seed: int) -> dict[str, float]:
    data = kit.load()
    start = kit.train(kit.mlp(seed, 16, 2), *data.train, steps=300, lr=5e-3, seed=seed, label_smoothing=0.1)
    moved = data.each(lambda x: torch.roll(x, 1, -1))
    held = share_out(moved.train[1].tolist(), CLIENTS, ALPHA, seed)
    figures = {"before": _score(start, moved.test), "accuracy_before": kit.accuracy(start, *moved.test)}
    for name, pro in (("uniform", False), ("pro", True)):
        model, rate = _best(lambda lr, pro=pro: federate(start, moved.train, held, seed, lr, pro=pro), moved)
        figures[name], figures[f"{name}_rate"] = _score(model, moved.test), rate
        figures[f"accuracy_{name}"] = kit.accuracy(model, *moved.test)
    single = [
        _best(lambda lr, c=c: alone(start, moved.train, held[c], seed_of(seed, c), lr), moved) for c in range(CLIENTS)
    ]
    figures["alone"] = statistics.mean(_score(model, moved.test) for model, _ in single)
    figures["accuracy_alone"] = statistics.mean(kit.accuracy(model, *moved.test) for model, _ in single)
    figures["alone_rate"] = statistics.median(rate for _, rate in single)
    return figures


@CLAIM.verdict
def verdict(figures: Figures) -> list[Check]:
    rows = list(zip(*(figures[name] for name in ("before", "uniform", "pro", "alone")), strict=True))
    falls = [before - uniform for before, uniform, _, _ in rows]
    excess = [(pro - uniform) / (before - uniform) for before, uniform, pro, _ in rows]
    return [
        Check("seeds whose test loss falls, FedKSeed", sum(fall > 0 for fall in falls), "==", len(rows)),
        Check("seeds whose test loss falls, Pro", sum(b - pro > 0 for b, _, pro, _ in rows), "==", len(rows)),
        Check("Pro's loss - FedKSeed's / its fall, median", statistics.median(excess), "<=", 0.05),
        Check("seeds where FedKSeed beats the mean client alone", sum(u < a for _, u, _, a in rows), "==", len(rows)),
    ]
