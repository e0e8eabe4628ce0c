"""From a data set to a batch: sources, templates, encoding with supervision masks, batches."""

from linchain_cli.data.batches import Batch, collate, micro_batches, step_rows, steps_per_epoch
from linchain_cli.data.dataset import PreparedData, prepare_data
from linchain_cli.data.encoding import encode_prompt, encode_responses
from linchain_cli.data.formats import load_rows
from linchain_cli.data.report import DataReport, EpochPlan, epoch_plan, length_histogram
from linchain_cli.data.rows import Rendered, RowError, Template
from linchain_cli.data.sources import DATASET_NAMES
from linchain_cli.data.store import EncodedRows
from linchain_cli.data.templates import get_template

__all__ = [
    "DATASET_NAMES",
    "Batch",
    "DataReport",
    "EncodedRows",
    "EpochPlan",
    "PreparedData",
    "Rendered",
    "RowError",
    "Template",
    "collate",
    "encode_prompt",
    "encode_responses",
    "epoch_plan",
    "get_template",
    "length_histogram",
    "load_rows",
    "micro_batches",
    "prepare_data",
    "step_rows",
    "steps_per_epoch",
]
