"""One training run on disk: its directory, its status, which run is meant, and its JSON-lines files."""

from linchain_cli.run.directory import (
    ComparisonDirectory,
    RunDirectory,
    in_use,
    is_run,
    locked,
    refuse_foreign,
)
from linchain_cli.run.finding import (
    Opened,
    find_adapter,
    find_run,
    is_adapter,
    newest_finished_run,
    runs_below,
)
from linchain_cli.run.jsonl import append_jsonl, cut_jsonl, jsonl_bytes, read_jsonl
from linchain_cli.run.status import KeptAdapter, Machine, RunBase, RunStatus, Status, Timings, now
