"""Everything between a user's file and a batch on the device.

    encoded = inputs.prepare(recipe.data, config=model.config, processor=tokenizer)
    trainer = Trainer(model, train_dataset=encoded.train, data_collator=encoded.collator, ...)

In reading order: `rows` (what a row and a bad row are); `sources`, `formats` and the files they name (finding and
reading them); `columns`, `task`, `check`, `labels` (what they mean); `store`, `split`, `gathered` (the checked rows);
`text`, `chat`, `examples`, `limits`, `encode` (what a model sees); `batches` (collators, packing); `encoded` (all).
"""

from tunesmith.inputs.default import default_data
from tunesmith.inputs.encoded import Encoded, encode, prepare
from tunesmith.inputs.gathered import Gathered, gather
from tunesmith.inputs.rows import BadRow, RawRows
from tunesmith.inputs.sources import read_rows
from tunesmith.inputs.task import infer_task

__all__ = [
    "BadRow",
    "Encoded",
    "Gathered",
    "RawRows",
    "default_data",
    "encode",
    "gather",
    "infer_task",
    "prepare",
    "read_rows",
]
