"""What an optimizer step would ask of a GPU, on a pretended one: nothing is computed, all is counted."""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from linchain_cli.chain import ChainConfig, find_siblings, inject
from linchain_cli.data.batches import collate
from linchain_cli.data.labelled_batches import collate_labelled
from linchain_cli.model import flat_rows, varlen
from linchain_cli.model.attention import FLAT_SDPA, GROUPED, note_reaches
from linchain_cli.model.classifier import Outputs, padding
from linchain_cli.model.fast import record
from linchain_cli.model.head import decoder_blocks, hidden_states
from linchain_cli.model.loading import load_model
from linchain_cli.model.tokenizer import load_tokenizer
from linchain_cli.model.varlen import Kernel
from linchain_cli.training import history, loop, norms
from linchain_cli.training import step as one_step
from linchain_cli.training.blocks import set_up_blocks
from linchain_cli.training.job import Job
from linchain_cli.training.labels import LabelObjective
from linchain_cli.training.norms import make_norms_lean
from linchain_cli.training.objective import CausalObjective
from linchain_cli.training.optimizer import FlatAdamW, trained_parameters
from linchain_cli.training.signals import StopRequest
from linchain_cli.training.state import TrainingState

from .. import pretend_gpu
from ..classifiers import KINDS, make_checkpoint

DEVICE = pretend_gpu.DEVICE

FAMILIES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox", "olmo2",
    "mixtral",
]  # fmt: skip
ROWS, MICRO, ANSWER = 16, 4, 3
SUMS = 64  # bytes: what a step copies of loss, slots and signals is smaller, rows are larger


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
        self.starts = None

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rows[index]


def take_steps(job: Job, gpu: pretend_gpu.PretendGpu) -> None:
    """An optimizer step, after a first one that does not count."""
    for _ in range(2):
        gpu.clear()
        loop.optimizer_step(job, np.arange(ROWS), 1e-3, StopRequest()).result()


def train(job: Job, gpu: pretend_gpu.PretendGpu) -> None:
    """Five steps of a run, and a checkpoint that another process writes."""
    take_steps(job, gpu)
    gpu.clear()
    job.data.validation = None
    job.recipe.training = SimpleNamespace(
        max_grad_norm=1.0,
        global_batch_size=ROWS,
        learning_rate=1e-3,
        lr_scheduler="constant",
        warmup_steps=0,
        max_steps=5,
        epochs=None,
        log_every=2,
        eval_every=100,
        save_every=100,
        early_stopping=None,
    )
    quiet = SimpleNamespace(step=lambda *values: None, row=lambda row: None)
    loop.train(job, quiet, StopRequest(), SimpleNamespace(adjust=lambda rows: None))


def validate(job: Job, gpu: pretend_gpu.PretendGpu) -> None:
    loop.validation(job)
    gpu.clear()
    loop.validation(job)


@pytest.fixture
def step(small_model, tmp_path, monkeypatch):
    """A function that does some work (an optimizer step) with a family on the pretended GPU."""

    monkeypatch.setattr(norms, "FUSED_ON", (DEVICE.type,))

    def step(
        family: str,
        *,
        flat: bool = True,
        dropout: float = 0.0,
        layers: int | None = None,
        kernel: Kernel | None = None,
        tokens: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        quantization: str = "none",
        recompute: bool = False,
        processes: int = 1,
        work: Callable[[Job, pretend_gpu.PretendGpu], None] = take_steps,
    ):
        model = small_model(family)
        if quantization != "none":
            model.save_pretrained(tmp_path / "base")
            model = load_model(tmp_path / "base", dtype="bfloat16", device="cpu", quantization=quantization)
        model.set_attn_implementation(FLAT_SDPA if model._supports_sdpa else GROUPED)
        note_reaches(model)  # which needs values
        if quantization == "none":
            model = model.to(dtype)
        if layers is not None:
            model = blocks_of(model, layers)
        model = model.to(DEVICE) if quantization == "none" else pretend_gpu.four_bits_to_device(model)
        make_norms_lean(model)
        if not flat:
            model.set_attn_implementation("sdpa")
        record(model).update({flat_rows._TRIAL: flat, flat_rows._KERNEL: kernel})
        with pretend_gpu.PretendGpu() as gpu:
            chains = inject(model, ChainConfig(4, 3, 8.0, dropout, "orthogonal", "all-linear"), 1)
            any_rows = torch.zeros(1, 2, dtype=torch.long, device=DEVICE)
            find_siblings(model, lambda: hidden_states(model, any_rows))
            set_up_blocks(model, recompute=recompute, compiled=False)
            parameters = trained_parameters(chains)
            training = SimpleNamespace(max_grad_norm=1.0)
            accelerator = SimpleNamespace(
                process_index=processes - 1,
                is_main_process=False,
                num_processes=processes,
                device=DEVICE,
                reduce=lambda tensor, reduction: tensor.clone(),
            )
            job = Job(
                recipe=SimpleNamespace(seed=1, adapter=SimpleNamespace(dropout=dropout), training=training),
                run=None,
                accelerator=accelerator,
                base=SimpleNamespace(model=model, pad_id=0),
                layers=chains,
                data=SimpleNamespace(train=Rows(), validation=Rows(), validation_sources={}),
                parameters=parameters,
                optimizer=FlatAdamW(parameters),
                store=None,
                fingerprints={},
                objective=CausalObjective(),
                state=TrainingState(micro_batch_size=None if tokens else MICRO, micro_batch_tokens=tokens),
            )
            work(job, gpu)
        return gpu

    return step


@pytest.mark.parametrize(
    ("family", "dropout"), [*((family, 0.0) for family in FAMILIES), ("llama", 0.1), ("gpt2", 0.1)]
)
def test_host_and_device_meet_once_per_step(step, family, dropout):
    gpu = step(family, dropout=dropout)
    assert len(gpu.reads) == 1, gpu.reads
    assert "step.py" in gpu.reads[0]


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"recompute": True}) for family in ("llama", "gemma2", "gpt2")),
        ("llama", {"recompute": True, "dropout": 0.1}),
        *((family, {"dtype": torch.float16}) for family in ("llama", "qwen2", "gpt_neox")),
        ("llama", {"quantization": "nf4"}),
        ("llama", {"quantization": "nf4", "dropout": 0.1, "recompute": True}),
        ("mistral", {"processes": 2}),
    ],
)
def test_host_and_device_meet_once_per_step_whatever_is_asked_for(step, family, options, monkeypatch):
    """Recomputation, float16, a base in 4 bit, several processes (the second one's side of it, alone)."""
    sums = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: sums.append(tensor.device))
    gpu = step(family, **options)
    assert len(gpu.reads) == 1 and "step.py" in gpu.reads[0], gpu.reads
    assert ("dequantize_4bit" in gpu.launches) == (options.get("quantization") == "nf4"), gpu.launches
    assert all(copy.asynchronous for copy in gpu.copies if copy.bytes > 8), gpu.copies
    # One sum over the processes in each of the two steps.
    assert sums == ([DEVICE] * 2 if options.get("processes", 1) > 1 else [])


def test_the_device_has_the_next_step_to_do_while_the_host_waits(step, monkeypatch):
    """But at the end, where a checkpoint is written, and in float16, where a step may be taken again."""
    monkeypatch.setattr(history, "AHEAD_ON", (DEVICE.type,))
    monkeypatch.setattr(one_step, "_signum", lambda flags: 0)  # what is read has no values
    of_one = step("llama").launched
    gpu = step("llama", work=train)
    assert len(gpu.reads) == len(gpu.behind) == 5, gpu.reads
    assert gpu.behind[:-1] == [of_one] * 4 and gpu.behind[-1] < 3
    assert max(step("llama", work=train, dtype=torch.float16).behind) < 3


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_a_validation_waits_for_the_device_once(step, family):
    gpu = step(family, work=validate)
    assert len(gpu.reads) == 1 and "mean_loss" in gpu.reads[0], gpu.reads
    large = [copy for copy in gpu.copies if copy.bytes > 8]
    assert len(large) == 2 * (ROWS // MICRO) and all(copy.asynchronous for copy in large)


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
    large = [copy for copy in gpu.copies if copy.bytes > SUMS]
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


def test_sixteen_short_rows_are_one_micro_batch(step):
    """By a budget of tokens, which saves three times what a micro-batch launches."""
    in_fours, at_once = step("llama"), step("llama", tokens=ROWS * 8)
    assert len([copy for copy in at_once.copies if copy.bytes > SUMS]) == 2
    assert at_once.launched < 0.45 * in_fours.launched


def peft_step(model: torch.nn.Module, gpu: pretend_gpu.PretendGpu) -> None:
    """The same step as Trainer takes it with PEFT's LoRA, after a first one: padded rows through SDPA."""
    from peft import LoraConfig, get_peft_model

    names = {name.rpartition(".")[2] for name, module in model.named_modules() if is_linear(module)}
    names -= {"lm_head", "embed_out", "router"}
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=sorted(names)))
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    rows = Rows()
    for _ in range(2):
        gpu.clear()
        for start in range(0, ROWS, MICRO):
            batch = vars(collate(rows, np.arange(start, start + MICRO), 0))
            loss = adapted(**{key: value.to(DEVICE, non_blocking=True) for key, value in batch.items()}).loss
            (loss / (ROWS // MICRO)).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


@pytest.mark.skipif(
    "LINCHAIN_TEST_TABLE" not in os.environ,
    reason="prints docs/performance.md's table of launches; LINCHAIN_TEST_TABLE=1 and -s show it",
)
def test_table_of_launches(step, small_model):
    """Kernels per block and micro-batch, waits and copies, beside PEFT's: two blocks less one."""
    print(
        "\n| family | kernels per block | PEFT's | waits per step | PEFT's |\n| --- | --- | --- | --- | --- |"
    )
    for family in FAMILIES:
        ours, theirs = [], []
        for layers in (1, 2):
            ours.append(step(family, layers=layers))
            model = blocks_of(small_model(family).to(torch.bfloat16), layers)
            model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
            with pretend_gpu.PretendGpu() as gpu:
                peft_step(model.to(DEVICE), gpu)
            theirs.append(gpu)
        blocks = [(gpus[1].launched - gpus[0].launched) / (ROWS // MICRO) for gpus in (ours, theirs)]
        reads = [len(gpus[1].reads) for gpus in (ours, theirs)]
        print(f"| {family} | {blocks[0]:.0f} | {blocks[1]:.0f} | {reads[0]} | {reads[1]} |")


def blocks_of(model: torch.nn.Module, count: int) -> torch.nn.Module:
    """The model with its first blocks alone."""
    blocks = decoder_blocks(model)
    parent, _, name = next(
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and module[0] is blocks[0]
    ).rpartition(".")
    setattr(model.get_submodule(parent), name, torch.nn.ModuleList(blocks[:count]))
    return model


@pytest.mark.parametrize("kind", ["bert", "roberta", "modernbert", "llama", "gpt2"])
@pytest.mark.parametrize("padded", [True, False])
def test_a_classifier_s_micro_batch_is_not_waited_for(tmp_path, kind, padded):
    """transformers would look whether rows have padding; if none has, the kernel without a mask is taken."""
    directory = make_checkpoint(kind, tmp_path)
    model = load_model(directory, dtype="bfloat16", device="cpu", outputs=Outputs(("good", "bad")))
    model.set_attn_implementation(FLAT_SDPA)
    padding(model, load_tokenizer(directory))
    model, lengths = model.to(DEVICE), [6, 5 if padded else 6]
    batch = collate_labelled(_Encoded(lengths), [0, 1], 0)
    with pretend_gpu.PretendGpu() as gpu:
        inject(model, ChainConfig(4, 1, 8.0, 0.0, "orthogonal", KINDS[kind][1]), 1)
        LabelObjective(2, "accuracy").add_gradients(model, batch, 1.0, DEVICE)
    assert not gpu.reads
    large = [copy for copy in gpu.copies if copy.bytes > 8]
    assert len(large) == 1 and large[0].asynchronous, gpu.copies
    assert bool(gpu.launches["_scaled_dot_product_flash_attention"]) != padded


def test_a_classifier_s_validation_waits_for_the_device_once(tmp_path):
    """For what it tells of all rows, however many micro-batches they are; and later for the loss."""
    directory = make_checkpoint("bert", tmp_path)
    model = load_model(directory, dtype="bfloat16", device="cpu", outputs=Outputs(("good", "bad")))
    model.set_attn_implementation(FLAT_SDPA)
    padding(model, load_tokenizer(directory))
    model = model.to(DEVICE)
    with pretend_gpu.PretendGpu() as gpu:
        found = LabelObjective(2, "accuracy").read(model, _Encoded([6, 6, 5]), [[0, 1], [2]], 0, DEVICE)
    assert len(gpu.reads) == 1 and "labels.py" in gpu.reads[0], gpu.reads
    assert [(rows.tolist(), len(values)) for rows, values in found.told] == [([0, 1, 2], 3)]


class _Encoded:
    """Rows with a label of these lengths, as data/store.py hands them out."""

    def __init__(self, lengths: list[int]):
        self._rows = [(np.arange(10, 10 + length), np.zeros(length, bool)) for length in lengths]
        self.targets = np.arange(len(lengths), dtype=np.float32)
        self.store = SimpleNamespace(has_segments=False)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self._rows[index]

    def segments(self, index: int) -> None:
        return None


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
