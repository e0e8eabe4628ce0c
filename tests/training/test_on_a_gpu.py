"""What an optimizer step would ask of a GPU, on a pretended one: nothing is computed, all is counted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from linchain_cli.chain import ChainConfig, find_siblings, inject
from linchain_cli.model import flat_rows, varlen
from linchain_cli.model.attention import FLAT_SDPA, GROUPED, note_reaches
from linchain_cli.model.fast import record
from linchain_cli.model.head import hidden_states
from linchain_cli.model.varlen import Kernel
from linchain_cli.training import loop, norms
from linchain_cli.training.job import Job
from linchain_cli.training.norms import make_norms_lean
from linchain_cli.training.optimizer import FlatAdamW, trained_parameters
from linchain_cli.training.state import TrainingState

sys.path.append(str(Path(__file__).resolve().parents[1]))
import pretend_gpu  # noqa: E402

DEVICE = pretend_gpu.DEVICE

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2",
    "mixtral",
]  # fmt: skip
ROWS, MICRO, ANSWER = 16, 4, 3


class Rows:
    """Rows of 5 to 8 tokens that begin alike; the last ones are supervised."""

    def __init__(self):
        random = np.random.RandomState(0)
        lengths = random.randint(5, 9, ROWS)
        self._rows = [
            (
                np.concatenate([[7, 8], random.randint(3, 100, length - 2)]),
                np.arange(length) >= length - ANSWER,
            )
            for length in lengths
        ]
        self.lengths = lengths
        self.supervised_counts = np.full(ROWS, ANSWER)

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rows[index]


@pytest.fixture
def step(small_model, monkeypatch):
    """A function that takes one optimizer step of a family on the pretended GPU, after a first one."""

    monkeypatch.setattr(norms, "FUSED_ON", (DEVICE.type,))

    def step(
        family: str,
        *,
        flat: bool = True,
        dropout: float = 0.0,
        layers: int | None = None,
        kernel: Kernel | None = None,
    ):
        model = small_model(family)
        model.set_attn_implementation(FLAT_SDPA if model._supports_sdpa else GROUPED)
        note_reaches(model)  # which needs values
        model = model.to(torch.bfloat16)
        if layers is not None:
            del model.model.layers[layers:]
        model = model.to(DEVICE)
        make_norms_lean(model)
        if not flat:
            model.set_attn_implementation("sdpa")
        record(model).update({flat_rows._TRIAL: flat, flat_rows._KERNEL: kernel})
        with pretend_gpu.PretendGpu() as gpu:
            chains = inject(model, ChainConfig(4, 3, 8.0, dropout, "orthogonal", "all-linear"), 1)
            any_rows = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
            find_siblings(model, lambda: hidden_states(model, any_rows))
            parameters = trained_parameters(chains)
            training = SimpleNamespace(max_grad_norm=1.0)
            job = Job(
                recipe=SimpleNamespace(seed=1, adapter=SimpleNamespace(dropout=dropout), training=training),
                run=None,
                accelerator=SimpleNamespace(process_index=0, num_processes=1, device=DEVICE),
                base=SimpleNamespace(model=model, pad_id=0),
                layers=chains,
                data=SimpleNamespace(train=Rows()),
                parameters=parameters,
                optimizer=FlatAdamW(parameters),
                store=None,
                fingerprints={},
                state=TrainingState(micro_batch_size=MICRO),
            )
            for _ in range(2):
                gpu.clear()
                loop.optimizer_step(job, np.arange(ROWS), 1e-3, SimpleNamespace(signum=0))
        return gpu

    return step


@pytest.mark.parametrize(
    ("family", "dropout"), [*((family, 0.0) for family in FAMILIES), ("llama", 0.1), ("gpt2", 0.1)]
)
def test_host_and_device_meet_once_per_step(step, family, dropout):
    gpu = step(family, dropout=dropout)
    assert len(gpu.reads) == 1, gpu.reads
    assert "optimizer_step" in gpu.reads[0]


@pytest.mark.parametrize("family", ["gpt2", "mistral", "llama4_text"])
def test_host_and_device_meet_once_per_step_with_the_kernel(step, family, monkeypatch):
    """And rows of 5 to 8 tokens, some of them beyond these windows and chunks."""
    monkeypatch.setattr(flat_rows, "LONG", 8)
    gpu = step(family, kernel=varlen.flash)
    assert gpu.launches["_varlen_attn"] > 0 and len(gpu.reads) == 1, gpu.reads


@pytest.mark.parametrize(
    ("family", "kernel"),
    [
        ("llama", None),
        ("gpt2", None),
        ("mixtral", None),
        ("llama", varlen.flash),
        ("llama4_text", varlen.flash),
    ],
)
def test_a_micro_batch_goes_over_in_two_copies(step, family, kernel, monkeypatch):
    """The rows and the labels, neither of which the host waits for."""
    monkeypatch.setattr(flat_rows, "LONG", 1)
    gpu = step(family, kernel=kernel)
    large = [copy for copy in gpu.copies if copy.bytes > 16]
    assert len(large) == 2 * (ROWS // MICRO), gpu.copies
    assert all(copy.asynchronous for copy in large)


@pytest.mark.parametrize(
    ("dropout", "kernel", "most"), [(0.0, None, 125), (0.1, None, 170), (0.0, varlen.flash, 119)]
)
def test_launches_of_a_block(step, dropout, kernel, most, monkeypatch):
    """Forward and backward of one Llama block in one micro-batch, all seven of its linear layers adapted, and
    its share of what comes once in the step's four micro-batches."""
    monkeypatch.setattr(flat_rows, "LONG", 1)
    whole, shorter = (
        step("llama", dropout=dropout, layers=layers, kernel=kernel).launched for layers in (None, 1)
    )
    assert (whole - shorter) / (ROWS // MICRO) <= most


def test_padded_rows_wait_for_the_device(step):
    """Why rows are read flat: transformers looks whether the rows are packed, in every forward."""
    assert len(step("llama", flat=False).reads) > ROWS // MICRO


def test_the_pretended_gpu_sees_what_it_is_for():
    with pretend_gpu.PretendGpu() as gpu:
        here = torch.ones(3, device=DEVICE)
        gpu.clear()
        (here + here).view(3, 1)
        assert gpu.launches == {"add": 1}
        with pytest.raises(RuntimeError, match="on the device and on the host at .*test_on_a_gpu"):
            here + torch.ones(3)
        assert (here * 2.0).sum().item() == 1.0 and "test_on_a_gpu" in gpu.reads[0]
        here[here > 0]
        assert len(gpu.reads) == 2
        torch.ones(5).to(DEVICE, non_blocking=True)
        assert gpu.copies[-1].bytes == 20 and gpu.copies[-1].asynchronous
        assert here.cpu().device.type == "cpu" and "copy to the host" in gpu.reads[-1]
