"""The decoding contract: a `LogitsProcessor` that owns its helper models and their caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from transformers import LogitsProcessor

from tunesmith.core.sidemodel import SideModel


class Decoder(LogitsProcessor):
    """Changes next-token scores. Options are keyword-only parameters of `__init__`.

    It runs before temperature, top-k and top-p: pass it to `generate(logits_processor=[...])`.

    Attributes:
        roles: Names of the helper models it needs, such as `("expert", "anti_expert")`.
        neutral: Options under which generation equals that of the model alone.
    """

    roles: ClassVar[tuple[str, ...]] = ()
    neutral: ClassVar[Mapping[str, object]] = {}

    def __init__(self, helpers: Mapping[str, SideModel]) -> None:
        self.helpers = dict(helpers)
