"""What a forked process of the tests runs: `linchain ARGUMENTS`, its output in a file, perhaps with something
going wrong.

`conftest.Starter` runs this file with ARGUMENTS, LOG, ENVIRONMENT, HOOK and VALUES as its globals.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import timedelta

import torch

from linchain_cli import cli, storage
from linchain_cli.evaluation import asked
from linchain_cli.machine import peak_resident_bytes, resident_bytes
from linchain_cli.model import loading
from linchain_cli.model.fast import record
from linchain_cli.model.head import hidden_states
from linchain_cli.model.loading import load_model
from linchain_cli.training import (
    base,
    checkpoints,
    job,
    loop,
    loss,
    memory,
    optimizer,
    processes,
    sharded,
)
from linchain_cli.training import step as one_step
from linchain_cli.training.base import suit_to_training
from linchain_cli.training.metrics import reset_peak_memory
from linchain_cli.training.processes import connect


def kill_in_save(operation: int, torn: bool) -> None:
    """SIGKILL to itself at the operation with this number (counted from 0) of those that saves make on the
    disk.
    """
    count, saving = 0, False
    save = checkpoints.CheckpointStore.save

    def watched_save(*args):
        nonlocal saving
        saving = True
        try:
            return save(*args)
        finally:
            saving = False

    def watched(name):
        original = getattr(storage, name)

        def run(*args):
            nonlocal count
            if saving and count == operation:
                if torn and name == "_write":
                    handle, data = args
                    handle.write(data[: len(data) // 2])
                    handle.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            count += saving
            return original(*args)

        setattr(storage, name, run)

    checkpoints.CheckpointStore.save = watched_save
    for name in ("_write", "_fsync", "rename", "mkdir"):
        watched(name)


def slow_steps(seconds: float) -> None:
    """Every optimizer step takes at least so long."""
    step = loop.optimizer_step

    def slow(*args):
        time.sleep(seconds)
        return step(*args)

    loop.optimizer_step = slow


def slow_loading(seconds: float, marker: str) -> None:
    """Loading the model takes so long; `marker` is a file that tells when it has begun."""
    put_in_chains = job.put_in_chains

    def slow(*args):
        open(marker, "w").close()
        time.sleep(seconds)
        return put_in_chains(*args)

    job.put_in_chains = slow


def record_gradients(step: int, path: str) -> None:
    """Writes the summed gradients of a step (counted from 0) to a file, and how many of the base's values lie
    here.
    """
    from safetensors.torch import save_file

    original = one_step.sum_over_processes

    def summed(accelerator, sums):
        original(accelerator, sums)
        nonlocal step
        if step == 0 and accelerator.is_main_process:
            trained = {name: p for name, p in models[0].named_parameters() if p.requires_grad}
            gradients = {name: parameter.grad.clone() for name, parameter in trained.items()}
            save_file({**gradients, "base bytes": torch.tensor(float(base_bytes()))}, path)
        step -= 1

    def base_bytes() -> int:
        frozen = [parameter for parameter in models[0].parameters() if not parameter.requires_grad]
        local = [getattr(parameter, "_local_tensor", parameter) for parameter in frozen]
        return sum(tensor.numel() * tensor.element_size() for tensor in local)

    models = []
    put_in_chains = job.put_in_chains
    job.put_in_chains = lambda model, recipe: models.append(model) or put_in_chains(model, recipe)
    one_step.sum_over_processes = summed


def fail_on_rank(rank: int, where: str, kind: str) -> None:
    """An error on one rank: `where` names what raises it."""
    if os.environ["RANK"] != str(rank):
        return

    def fail(*args, **options):
        if kind == "exit":
            os._exit(7)
        raise {
            "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "bug": ValueError("a bug"),
        }[kind]

    module, name = {
        "read": (sharded, "read_into"),
        "prepare": (job, "put_in_chains"),
        "size": (memory, "_peak_of"),
        "heaviest": (loss, "add_gradients"),
        "step": (loop, "optimizer_step"),
        "results": (asked, "has_result"),
    }[where]
    setattr(module, name, fail)


def run_out_of_memory(rank: int, step: int, seconds: float) -> None:
    """Slow steps; in one of them (counted from 0) memory runs out on one rank, the once."""
    slow_steps(seconds)
    slow, add_gradients, steps = loop.optimizer_step, loss.add_gradients, 0

    def small(*args):
        loss.add_gradients = add_gradients
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def watched(*args):
        nonlocal steps
        if steps == step and os.environ["RANK"] == str(rank):
            loss.add_gradients = small
        steps += 1
        return slow(*args)

    loop.optimizer_step = watched


def unlike_devices(rank: int, what: str) -> None:
    """One rank computes on another device than the others: one that multiplies no bfloat16, that rounds in
    its own way, or on which a base does not fit."""
    other = os.environ["RANK"] == str(rank)
    if what == "type":
        loading._multiplies_bfloat16 = lambda device: not other
    elif what == "memory":
        base._shards = lambda recipe, directory, accelerator: other
    elif other:
        clip = optimizer.FlatAdamW.clip_gradients

        def rounds_otherwise(self, *args):
            norm = clip(self, *args)
            self.sums[: -optimizer.EXTRAS].mul_(1 + 2**-20)
            return norm

        optimizer.FlatAdamW.clip_gradients = rounds_otherwise


def compare_spread_bases(bases: list[tuple[str, str]], path: str, per_machine: bool) -> None:
    """Instead of the command: loads each base (its directory and its quantization) whole and spread, per
    machine with shards of the offloaded kind, and writes what the two differ in.
    """
    accelerator, found = connect(), {}
    for directory, quantization in bases:
        options = {"dtype": "float32" if quantization == "none" else "bfloat16", "quantization": quantization}
        whole, spread = (
            load_model(directory, device="cpu", **options),
            sharded.load_sharded(
                directory, accelerator, per_machine=per_machine, offload=per_machine, **options
            ),
        )
        for model in (whole, spread):
            suit_to_training(model)
        name, expected, ours = f"{type(whole).__name__} {quantization}", traits(whole), traits(spread)
        found[name] = [trait for trait in expected if not torch.equal(expected[trait], ours[trait])]
        found[name] += sorted(expected.keys() ^ ours.keys())
    if accelerator.is_main_process:
        with open(path, "w") as file:
            json.dump(found, file)
    sys.exit()


def traits(model) -> dict[str, torch.Tensor]:
    """What a base computes and holds whole: logits, gradients, buffers, and how it was made fast."""
    ids, embedded = torch.arange(1, 25)[None], []
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits

    def apart(_module, _inputs, output):
        embedded.append(output.detach().requires_grad_())
        return embedded[0].clone()

    hook = model.get_input_embeddings().register_forward_hook(apart)
    hidden_states(model, ids).float().sin().sum().backward()
    hook.remove()
    ways = [model.config._attn_implementation, str(record(model)["reads flat rows"])]
    return {
        "logits": logits,
        "gradient": embedded[0].grad,
        "ways": torch.tensor(list(" ".join(ways).encode())),
        **dict(model.named_buffers()),
    }


def measure_spread_base(small: str, directory: str, path: str) -> None:
    """Instead of the command: loads a base spread, has it read a few tokens, and writes by how many bytes the
    process grew at most. `small` is a base that comes first, for what every first time takes.
    """
    accelerator = connect()
    for each in (small, directory):
        before = resident_bytes()
        reset_peak_memory(accelerator.device)
        model = sharded.load_sharded(each, accelerator, dtype="bfloat16", attention="sdpa")
        with torch.no_grad():
            hidden_states(model, torch.arange(1, 9)[None])
    with open(f"{path}-{accelerator.process_index}", "w") as file:
        file.write(str(peak_resident_bytes() - before))
    sys.exit()


def hang_on_rank(rank: int, seconds: float, patience: float) -> None:
    """One rank's steps take so long; a process waits for another one `patience` seconds in training."""
    processes.STEP_PATIENCE = timedelta(seconds=patience)
    if os.environ["RANK"] == str(rank):
        slow_steps(seconds)


def validation_losses(values: list[float]) -> None:
    """What the validations find, one after another."""
    found = iter(values)
    loop.validation = lambda job: {"loss": next(found)}


def main() -> None:
    output = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)  # noqa: F821
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1), open(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)  # noqa: F821
    sys.argv = ["linchain", *ARGUMENTS]  # noqa: F821
    torch.set_num_threads(1)
    if HOOK:  # noqa: F821
        globals()[HOOK](**VALUES)  # noqa: F821
    cli.main()


if __name__ == "__main__":
    main()
