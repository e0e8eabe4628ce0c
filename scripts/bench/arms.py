"""One arm of the training benchmark, in a process of its own (`processes.Arm`): reads `go` lines, runs a
round for each, prints JSON.

All arms see the same rows in the same steps, start from the same A and links (B = 0), and use AdamW at one
constant rate, so that their losses can be compared.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from linchain_cli.training.metrics import peak_memory_bytes, reset_peak_memory
from scripts.bench.job import ALPHA_PER_RANK, BATCH, RATE, TARGETS, BenchRows, make_job, restore_norms


def announce(**values) -> None:
    print(json.dumps(values), flush=True)


def wait_for_go() -> None:
    if not sys.stdin.readline():
        sys.exit(0)


def peak_memory_mb(settings: dict) -> float:
    """The most since the last reset: of the allocator on CUDA, else of the process."""
    return peak_memory_bytes(torch.device(settings["device"])) / 2**20


def serve(settings: dict, job, rows: BenchRows, step) -> None:
    """Runs `settings["steps"]` calls of `step(number)` for each `go`; it gives the loss, or what does."""
    announce(ready=True)
    reset_peak_memory(torch.device(settings["device"]))
    for number in range(settings["rounds"]):
        wait_for_go()
        losses = []
        began = time.perf_counter()
        steps = range(number * settings["steps"], (number + 1) * settings["steps"])
        for index in steps:
            losses.append(step(index))
        if settings["device"] == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        losses = [loss() if callable(loss) else loss for loss in losses]
        tokens = sum(rows.tokens(index) for index in steps)
        announce(seconds=seconds, tokens=tokens, losses=losses, peak_mb=peak_memory_mb(settings))


def linchain_arm(settings: dict, depth: int, compiled: bool = False) -> None:
    """linchain's own optimizer step, with its threads set by the load as training sets them.

    The other arms' turns are no load: behind a pause it begins with all threads, as a run does.
    """
    from linchain_cli.machine import SharedCpus
    from linchain_cli.training.history import AHEAD_ON
    from linchain_cli.training.signals import StopRequest
    from linchain_cli.training.step import optimizer_step
    from linchain_cli.training.threads import LoadedCpus

    if compiled and (backend := settings.get("compile_backend")):
        torch.compile = partial(torch.compile, backend=backend)
    job = make_job(settings, depth, compiled)
    rows, stop = BenchRows(job), StopRequest()
    shared = SharedCpus(torch.get_num_threads())
    cpus = LoadedCpus(job, shared, lambda message: None)
    asked, ended = deque(), -math.inf

    def step(index: int) -> Callable[[], float]:
        nonlocal ended
        if time.monotonic() - ended > 1:
            shared.begin()
            torch.set_num_threads(shared.threads)
        cpus.adjust(rows.by_step(index))
        taken = optimizer_step(job, rows.by_step(index), RATE, stop)
        asked.append(taken)
        while len(asked) > (settings["device"] in AHEAD_ON):  # as training waits
            asked.popleft().result()
        ended = time.monotonic()
        return lambda: taken.result().loss

    serve(settings, job, rows, step)


def limit_arm(settings: dict) -> None:
    """The frozen base's forward and the backward of its activations, in the same batches: no adapter, no loss
    head.

    transformers' own modules, with the fastest attention of the machine, which on a CPU is linchain's.
    """
    from linchain_cli.chain import detach
    from linchain_cli.data.batches import collate, micro_batches

    job = make_job(settings, 0)
    detach(job.model)
    restore_norms(job.model)
    rows = BenchRows(job)
    embed, device = job.model.get_input_embeddings(), job.device

    def step(index: int) -> float:
        for part in micro_batches(rows.by_step(index), rows.data.lengths, settings["micro"]):
            batch = collate(rows.data, part, rows.pad_id)
            inputs = embed(batch.input_ids.to(device)).detach().requires_grad_()
            hidden = job.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
            hidden.backward(torch.ones_like(hidden))
        return math.nan

    serve(settings, job, rows, step)


class UncollapsedChain(nn.Module):
    """The authors' way: a base and nn.Linear modules A, W1 … Wn, B run one after another on every token."""

    def __init__(self, layer):
        super().__init__()
        self.base, self.scaling = layer.base, layer.scaling

        def linear(weight: torch.Tensor) -> nn.Linear:
            module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
            module.weight = nn.Parameter(weight.detach().clone())
            return module

        self.chain = nn.Sequential(*(linear(weight) for weight in (layer.A, *layer.links, layer.B)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.scaling * self.chain(x.to(torch.float32)).to(x.dtype)


def hugging_face_arm(settings: dict, adapter: str, trainer: str) -> None:
    """An adapter (PEFT's LoRA, or the uncollapsed chain) under transformers' Trainer or TRL's SFTTrainer.

    `trainer` with "+unpadded" reads rows without padding: Trainer puts a micro-batch's rows behind each other
    as one, SFTTrainer packs them. SDPA is what `from_pretrained` takes by default. TRL, which is to run at
    its best setting, gets on a CPU what is faster there out of transformers' own attentions, eager.
    """
    from linchain_cli.chain import chain_layers, detach

    eager = trainer.startswith("sft") and settings["device"] == "cpu"
    job = make_job(settings, 3 if adapter == "uncollapsed" else 0, attention="eager" if eager else "sdpa")
    rows, model = BenchRows(job), job.model
    layers = chain_layers(model)
    detach(model)
    restore_norms(model)
    if adapter == "uncollapsed":
        for path, layer in layers.items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, UncollapsedChain(layer))
    else:
        model = with_peft(model, layers, settings["rank"])
    run = {"trainer": run_trainer, "sft": run_sft}[trainer.partition("+")[0]]
    run(settings, model, job, rows, unpadded=trainer.endswith("+unpadded"))


def with_peft(model: nn.Module, layers: dict, rank: int) -> nn.Module:
    """PEFT's LoRA with the same initial A."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank,
        lora_alpha=ALPHA_PER_RANK * rank,
        target_modules=TARGETS,
        lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    with torch.no_grad():
        for path, layer in layers.items():
            model.get_submodule(f"base_model.model.{path}").lora_A["default"].weight.copy_(layer.A)
    return model


def clocked(settings: dict, tokens_of):
    """A trainer callback that waits for `go` before each round and reports it afterwards.

    `tokens_of(step)` counts the unpadded tokens of a step.
    """
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        began = 0.0
        losses: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step % settings["steps"] == 0:
                if state.global_step == 0:
                    announce(ready=True)
                    reset_peak_memory(torch.device(settings["device"]))
                wait_for_go()
                self.losses = []
                self.began = time.perf_counter()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if not logs or "loss" not in logs:
                return
            self.losses.append(logs["loss"])
            if state.global_step % settings["steps"]:
                return
            if settings["device"] == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - self.began
            tokens = sum(tokens_of(state.global_step - back) for back in range(1, settings["steps"] + 1))
            announce(seconds=seconds, tokens=tokens, losses=self.losses, peak_mb=peak_memory_mb(settings))

    return Clock()


def trainer_arguments(settings: dict) -> dict:
    """Trainer's defaults but for what every arm shares: batches, rate, no warm-up. Rows come shuffled
    already."""
    return {
        "output_dir": settings["scratch"], "max_steps": settings["rounds"] * settings["steps"],
        "per_device_train_batch_size": settings["micro"], "gradient_accumulation_steps": BATCH //
        settings["micro"], "learning_rate": RATE, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "report_to": [], "train_sampling_strategy": "sequential", "disable_tqdm": True,
        "use_cpu": settings["device"] == "cpu", "fp16": False,
        # Usual on GPUs: the adapter's products in bfloat16 as well, its values in float32.
        "bf16": settings["device"] == "cuda" and settings["dtype"] == "bfloat16",
    }  # fmt: skip


def run_trainer(settings: dict, model: nn.Module, job, rows: BenchRows, unpadded: bool = False) -> None:
    from transformers import DataCollatorForSeq2Seq, DataCollatorWithFlattening, Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    job.base.tokenizer.pad_token_id = rows.pad_id
    padding = DataCollatorForSeq2Seq(job.base.tokenizer, padding=True)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(settings)),
        train_dataset=rows.examples(settings["rounds"] * settings["steps"]),
        data_collator=DataCollatorWithFlattening() if unpadded else padding,
        callbacks=[clocked(settings, rows.tokens)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def run_sft(settings: dict, model: nn.Module, job, rows: BenchRows, unpadded: bool = False) -> None:
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    job.base.tokenizer.pad_token_id = rows.pad_id
    examples = [
        {
            "input_ids": example["input_ids"],
            "completion_mask": [int(label != -100) for label in example["labels"]],
        }
        # Packing makes fewer rows of them, so it starts from more.
        for example in rows.examples((4 if unpadded else 1) * settings["rounds"] * settings["steps"])
    ]
    arguments = trainer_arguments(settings) | {
        "max_length": settings["max_length"], "completion_only_loss": not settings["train_on_inputs"],
        "gradient_checkpointing": False, "packing": unpadded,
    }  # fmt: skip
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**arguments), train_dataset=Dataset.from_list(examples),
        processing_class=job.base.tokenizer,
    )  # fmt: skip
    # Packing makes other rows of the given ones, so a step's tokens are counted in what it really trains on.
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    trainer.add_callback(clocked(settings, lambda step: sum(lengths[BATCH * step : BATCH * (step + 1)])))
    trainer.remove_callback(PrinterCallback)
    trainer.train()


ARMS = {
    "limit": limit_arm,
    "peft": lambda settings: hugging_face_arm(settings, "lora", "trainer"),
    "trl": lambda settings: hugging_face_arm(settings, "lora", "sft"),
    "peft-unpadded": lambda settings: hugging_face_arm(settings, "lora", "trainer+unpadded"),
    "trl-packing": lambda settings: hugging_face_arm(settings, "lora", "sft+unpadded"),
    "uncollapsed": lambda settings: hugging_face_arm(settings, "uncollapsed", "trainer"),
    **{
        f"linchain-{depth}": (lambda settings, depth=depth: linchain_arm(settings, depth))
        for depth in (0, 1, 3, 8)
    },
    "linchain-3-compiled": lambda settings: linchain_arm(settings, 3, compiled=True),
}
