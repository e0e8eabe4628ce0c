"""What all tests share: no network, a cache of their own, and tiny models with a tokenizer, built here.

The environment is set before anything imports transformers or datasets, which read it once.
"""

from __future__ import annotations

import os
import tempfile

_HF_HOME = tempfile.TemporaryDirectory(prefix="linchain-tests-hf-")
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
for _variable in ("HF_TOKEN", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "LINCHAIN_DATA_DIR"):
    os.environ.pop(_variable, None)

import random  # noqa: E402
import shutil  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any  # noqa: E402

import pytest  # noqa: E402

from .architectures import ARCHITECTURES, CHECKPOINTS, model_class, random_model  # noqa: E402

if TYPE_CHECKING:
    import torch

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_THINGS = ["apple", "hammer", "river", "candle", "horse", "window", "blanket", "kettle", "ladder", "pencil"]
_PLACES = ["kitchen", "garden", "school", "forest", "market", "station", "harbour", "office"]
_VERBS = ["found", "carried", "painted", "washed", "moved", "sold", "borrowed", "repaired"]


def _commonsense_rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    """`n` rows in the Commonsense170K format: true/false, two solutions, three to five answers, in turn."""
    rng = random.Random(seed)
    rows = []
    for index in range(n):
        thing, verb = rng.choice(_THINGS), rng.choice(_VERBS)
        style = ("boolq", "piqa", "answers")[index % 3]
        if style == "boolq":
            names = ["true", "false"]
            question = f"was the {thing} {verb} in the {rng.choice(_PLACES)} by person {index}?"
            text = f"Please answer the following question with true or false, question: {question}"
        elif style == "piqa":
            names = ["solution1", "solution2"]
            first, second = rng.sample(_PLACES, 2)
            text = (
                f"Please choose the correct solution to the question: "
                f"where was the {thing} {verb} by person {index}?"
                f"\n\nSolution1: in the {first}\n\nSolution2: in the {second}"
            )
        else:
            names = [f"answer{number}" for number in range(1, rng.choice([3, 4, 5]) + 1)]
            options = rng.sample(_PLACES, len(names))
            listed = " ".join(
                f"{name.capitalize()}: the {place}" for name, place in zip(names, options, strict=True)
            )
            text = (
                f"Please choose the correct answer to the question: "
                f"Where was the {thing} {verb} by person {index}?"
                f"\n\n{listed}"
            )
        answer = rng.choice(names)
        rows.append(
            {
                "instruction": f"{text}\n\nAnswer format: {'/'.join(names)}",
                "input": "",
                "output": f"the correct answer is {answer}",
                "answer": answer,
            }
        )
    return rows


@pytest.fixture(scope="session")
def commonsense_rows() -> Callable[..., list[dict[str, str]]]:
    """The function `commonsense_rows(n, seed=0)`: deterministic rows in the Commonsense170K format."""
    return _commonsense_rows


def _build_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|pad|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        f"{row['instruction']}\n\n### Response:\n{row['output']}" for row in _commonsense_rows(300, seed=1)
    ]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved byte-level BPE tokenizer: about 600 tokens, pad 0, bos 1, eos 2, and a chat template."""
    directory = tmp_path_factory.mktemp("tiny-tokenizer")
    _build_tokenizer().save_pretrained(directory)
    return directory


def _save_model(config, tokenizer_dir: Path, directory: Path) -> Path:
    """A randomly initialised (seed 0) float32 checkpoint of `config`, with the tokenizer beside it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(directory)
    return directory


def _token_fields(tokenizer_dir: Path) -> dict[str, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _llama_config(tokenizer_dir: Path, tied: bool):
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        **_token_fields(tokenizer_dir),
    )


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A Llama checkpoint: 2 layers, hidden 64, grouped-query attention, untied embeddings, float32."""
    config = _llama_config(tiny_tokenizer_dir, tied=False)
    return _save_model(config, tiny_tokenizer_dir, tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    """A copy of the tiny Llama that one test may change or damage."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "tiny-llama"))


@pytest.fixture(scope="session")
def tiny_tied_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """The same Llama with output embeddings tied to the input's: no `lm_head.weight` in the file."""
    config = _llama_config(tiny_tokenizer_dir, tied=True)
    return _save_model(config, tiny_tokenizer_dir, tmp_path_factory.mktemp("tiny-tied"))


@pytest.fixture(scope="session")
def tiny_gpt2_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Path:
    """A GPT-2 checkpoint, whose projections are Conv1D [in, out]: 2 layers, hidden 64, tied, no dropout."""
    from transformers import GPT2Config

    config = GPT2Config(
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=512,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_token_fields(tiny_tokenizer_dir),
    )
    return _save_model(config, tiny_tokenizer_dir, tmp_path_factory.mktemp("tiny-gpt2"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums over several threads may differ in their last bit; one thread always gives the same numbers."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer_dir: Path) -> Callable[..., Path]:
    """`base_of(architecture, dtype=float32)`: the directory of a random checkpoint with a tokenizer, made
    once.

    `gpt2_bare` is saved from the model without its head, so that its keys lack the prefix `transformer.`.
    """
    made: dict[tuple[str, torch.dtype], Path] = {}

    def build(architecture: str, dtype: torch.dtype | None = None) -> Path:
        import torch

        dtype = dtype or torch.float32
        if (architecture, dtype) not in made:
            import transformers

            name, options = CHECKPOINTS[architecture]
            config = getattr(transformers, name)(**options)
            directory = tmp_path_factory.mktemp(architecture)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = model_class(config, architecture.endswith("_bare")).from_config(config, dtype=dtype)
            model.save_pretrained(directory)
            transformers.AutoTokenizer.from_pretrained(tiny_tokenizer_dir).save_pretrained(directory)
            made[architecture, dtype] = directory
        return made[architecture, dtype]

    return build


@pytest.fixture(scope="session")
def small_model() -> Callable:
    """small_model(kind): a random model of two or three blocks (float32, frozen, in eval mode)."""
    return random_model


@pytest.fixture(scope="session")
def own_attention() -> set[str]:
    """The architectures that compute attention by themselves, without transformers' interface."""
    import transformers
    from packaging.version import Version

    older = Version(transformers.__version__) < Version("5.24")
    return {"bloom", "falcon", "mpt", "gpt_neo", *(("gptj", "codegen") if older else ())}


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Every model type that `small_model` knows, in turn."""
    return request.param


@pytest.fixture(scope="session")
def hidden_and_gradient() -> Callable:
    """hidden_and_gradient(model, compute): the hidden states that `compute()` gives, and the gradient of the
    sum of their sines for the model's embeddings."""

    def run(model, compute):
        embeddings = model.get_input_embeddings().weight
        embeddings.grad = None
        embeddings.requires_grad_()
        hidden = compute()
        hidden.sin().sum().backward()
        embeddings.requires_grad_(False)
        return [hidden.detach(), embeddings.grad]

    return run


@pytest.fixture
def group_of_gpus(monkeypatch) -> list[Any]:
    """Makes torch see two GPUs; what is asked of them, and of the process group, is noted in order."""
    import torch

    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda *backends, timeout: asked.append((*backends, timeout))
    )
    return asked


@pytest.fixture
def launched_as(monkeypatch) -> Callable[..., None]:
    """launched_as(rank, of=2): gives this process the environment that a launcher gives one of several."""

    def launched_as(rank: int, of: int) -> None:
        for name, value in {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": of,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29500,
        }.items():
            monkeypatch.setenv(name, str(value))

    return launched_as


@pytest.fixture
def harness_alone(monkeypatch) -> None:
    """lm-evaluation-harness without its own thousands of tasks, which take seconds to look through."""
    tasks = pytest.importorskip("lm_eval.tasks")

    class Few(tasks.TaskManager):
        def __init__(self, include_path: list[str] | None):
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Few)
