"""From a data set to a batch: sources, templates, encoding with supervision masks, batches."""

from linchain_cli.data.batches import Batch, collate, micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.encoding import encode_prompt, encode_responses
from linchain_cli.data.templates import Rendered, RowError, Template, get_template

__all__ = [
    "Batch",
    "Rendered",
    "RowError",
    "Template",
    "collate",
    "encode_prompt",
    "encode_responses",
    "get_template",
    "micro_batches",
    "step_rows",
    "steps_per_epoch",
]
