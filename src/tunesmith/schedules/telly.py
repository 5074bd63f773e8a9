"""Telly: the embedding and the bottom K blocks stay as they are; everything above them trains.

Shi, Wang, Zhang, Du, Han, Zhang and Sun, "Towards Efficient Fine-tuning of Pre-trained Code Models: An Experimental
Study and Beyond", ISSTA 2023 (Telly-K, Section 6).

    Telly-0: the embedding does not train;   Telly-K: nor do blocks 0, ..., K - 1

The default is K = 5 of the 12 blocks of UniXcoder: 49.62 M of 125.93 M parameters train, code search gives MRR 0.726
(0.720 in full), code generation the best BLEU, 34.36 (33.82); K = 8 gives 0.723 and 32.12, K = 11 0.690 and 27.71.

Because what is frozen is a prefix, activations, gradients, optimizer state and the FLOPs of the backward pass fall by
the same amount with each block; freezing the top instead would save weight gradients alone, since gradients still have
to pass through it. With `cache` the prefix is computed once per distinct input (`core/freezing.py`), which the paper
does not do.
"""

from __future__ import annotations

from collections.abc import Collection

from pydantic import NonNegativeInt, PositiveFloat

from tunesmith.core.freezing import FIRST, Prefix, bottom, chosen_stacks
from tunesmith.core.part import part
from tunesmith.core.schedule import Schedule
from tunesmith.errors import TunesmithError

BEST = 5 / 12


@part(
    paper="arXiv:2304.05216",
    refuses={"fsdp": "what trains of a sharded weight is settled before the run begins"},
)
class Telly(Schedule):
    """Freezes the embedding and the bottom blocks for the whole run.

    Args:
        blocks: K, the number of blocks that are frozen; 0 freezes the embedding alone. Without a number, 5 of 12 as in
            the paper, rounded for other depths and at least 1.
        stack: Which stack of blocks: `first` in the order of execution (the encoder of an encoder-decoder; the
            decoder's embedding is frozen with it where it is the same tensor), `all` (K blocks of each), or the path
            of one, such as `decoder.block`.
        freeze_pooler: Freeze BERT's pooler as well, as in the paper's counts, whose tasks do not use it.
        cache: Keep what leaves the frozen blocks per distinct input, in the memory of the CPU, and skip these blocks
            when it comes again. Needs a frozen part without dropout, and a fixed padding to see rows again.
        cache_gib: The most that is kept. A batch is skipped only if all its rows are there, so give it room for the
            whole data set: length x width x bytes of the dtype for each row.
    """

    def __init__(
        self,
        *,
        blocks: NonNegativeInt | None = None,
        stack: str = FIRST,
        freeze_pooler: bool = False,
        cache: bool = False,
        cache_gib: PositiveFloat = 4.0,
    ) -> None:
        super().__init__()
        self.blocks, self.stack, self.freeze_pooler = blocks, stack, freeze_pooler
        self.cache, self.cache_gib = cache, cache_gib
        self.frozen: frozenset[str] = frozenset()
        """Names of what is frozen, also of what did not train anyway."""
        self.prefix: Prefix | None = None
        """What is kept, with its counts of rows that were there (`hits`) and were not (`misses`)."""

    def on_attach(self) -> None:
        """Find the names, and put the cache before the blocks.

        Raises:
            ModelError: there are no blocks, fewer than K, no such stack.
            TunesmithError: nothing that trains is left; outputs cannot be kept.
        """
        assert self.model is not None
        self._release()
        shortest = min(len(held) for held in chosen_stacks(self.model, self.stack).values())
        k = max(1, round(BEST * shortest)) if self.blocks is None else self.blocks
        self.frozen = bottom(self.model, k, stack=self.stack)
        if self.freeze_pooler:
            self.frozen |= {n for n, _ in self.model.named_parameters() if "pooler" in n.split(".")}
        if self.eligible and not self.eligible.keys() - self.frozen:
            raise TunesmithError(
                f"telly: all of the {len(self.eligible)} parameters that train are in the embedding or the bottom {k} "
                f"blocks of {type(self.model).__name__}; freeze fewer"
            )
        if self.cache:
            prefix = Prefix(self.model, k, int(self.cache_gib * 2**30), stack=self.stack)
            prefix.attach()
            self.prefix = prefix

    def _release(self) -> None:
        if self.prefix is not None:
            self.prefix.detach()

    def active(self, step: int) -> Collection[str]:
        return self.eligible.keys() - self.frozen

    def detach(self) -> None:
        """Let everything train again, and keep no outputs any more."""
        self._release()
        super().detach()
