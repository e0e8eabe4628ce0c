"""Base models: loaded frozen, in the asked dtype, quantised if asked, or refused.

`files.locate` turns a hub id, a directory or a .gguf file into a checkpoint directory; the functions here
read such a directory with transformers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linchain_cli.errors import InputError, LinchainError, first_line
from linchain_cli.machine import is_out_of_memory
from linchain_cli.model.attention import FLAT_SDPA, GROUPED, use_attention
from linchain_cli.model.checkpoint import StoredTensor
from linchain_cli.model.classifier import Outputs, check_missing, clear_drawn
from linchain_cli.model.config import UNUSABLE, auto_class, load_config
from linchain_cli.model.fast import REFUSALS, changing_nothing, probe_ids
from linchain_cli.model.files import read_config, weight_files
from linchain_cli.model.int8 import store_only
from linchain_cli.model.packed import open_weights, quantization_of
from linchain_cli.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig, GenerationConfig, PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def default_device() -> torch.device:
    """The first GPU if CUDA sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype a recipe's `dtype` means on `device`.

    `auto` is bfloat16 where the hardware multiplies it, else float16 on a GPU and float32 on a CPU. On a CPU
    that is AVX512-BF16 or AMX (about twice as fast as float32, measured; without them bfloat16 is slower), or
    ARM's bf16 instructions.
    """
    if name == "auto":
        if _multiplies_bfloat16(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        features = torch.cpu.get_capabilities()
        return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


def resolve_attention(name: str, device: torch.device) -> str | None:
    """The attention implementation for transformers; None leaves it to the model (SDPA where it can).

    With `auto`, `choose_attention` then gives every model that it suits an attention of linchain's own
    (model/attention.py): on a CPU instead of eager, whose backward in bfloat16 is faster than SDPA's up to
    some 300 tokens, elsewhere instead of what transformers takes by default.
    """
    if name == "auto":
        return GROUPED if device.type == "cpu" else None
    return name


def load_model(
    directory: Path,
    *,
    dtype: str = "auto",
    device: torch.device | str | None = None,
    quantization: str = "none",
    attention: str = "auto",
    outputs: Outputs | None = None,
) -> PreTrainedModel:
    """The model of a checkpoint directory, in eval mode, all frozen, on `device` (default: the GPU, if any).

    `quantization` rounds the linear layers but the output head: `int8` (as bitsandbytes stores it) or `nf4`
    (4-bit normal float, double quantisation, computing in `dtype`). With `outputs` it is a sequence
    classifier, whose head is zero where the checkpoint has none for these outputs (`chain.head` draws it).

    Raises InputError for a checkpoint that cannot be used (damaged, incomplete, not decoder-only, quantised
    in a form that cannot be restored) and LinchainError if it does not fit into memory.
    """
    device = torch.device(device) if device is not None else default_device()
    model = read_model(
        directory,
        dtype=dtype,
        device=device,
        quantization=quantization,
        attention=attention,
        outputs=outputs,
    )
    if quantization != "none":
        _refuse_weights_read_apart(model, quantization)
    choose_attention(model, attention)
    return model


# Fills an empty model from its checkpoint, with transformers' settings for reading (LoadStateDictConfig), and
# returns what it found (LoadStateDictInfo).
Fill = Callable[["PreTrainedModel", Any], Any]


def read_model(
    directory: Path,
    *,
    dtype: str,
    device: torch.device,
    quantization: str,
    attention: str,
    fill: Fill | None = None,
    spread: bool = False,
    outputs: Outputs | None = None,
) -> PreTrainedModel:
    """`load_model` without linchain's own attention, for which the model has to run.

    With `fill` the model is built empty, and `fill` reads its weights. `spread` packs 4-bit weights into
    numbers of `dtype`, because FSDP2 leaves tensors of whole numbers on every process.
    """
    directory = Path(directory)
    resolved = resolve_dtype(dtype, device)
    config = load_config(directory, outputs)
    weight_files(directory)
    implementation = resolve_attention(attention, device)
    options = {
        "config": config,
        "dtype": resolved,
        "attn_implementation": "eager" if implementation == GROUPED else implementation,
        "quantization_config": _quantization_config(
            quantization, resolved, resolved if spread else torch.uint8
        ),
        "device_map": {"": device} if device.type != "cpu" or quantization != "none" else None,
    }
    if outputs is None:
        options["generation_config"] = _generation_config(directory, config)
    else:
        options["ignore_mismatched_sizes"] = True  # a classifier of other classes: `check_missing` looks
    if fill is None and quantization_of(read_config(directory)):
        fill = _read_restored(directory)
    with loading_problems(directory, attention), quiet(), _filled_by(fill):
        model, loading = auto_class(config, outputs).from_pretrained(
            directory, output_loading_info=True, trust_remote_code=False, **options
        )
    missing = loading.get("missing_keys", ())
    if outputs is not None:
        missing = check_missing(model, missing, [key for key, *_ in loading.get("mismatched_keys", ())])
        clear_drawn(model)
    refuse_incomplete(directory, missing)
    _refuse_rounded_head(model, quantization)
    _keep_differentiable(model)
    store_only(model, resolved)
    _keep_unscaled(model)
    return model.eval().requires_grad_(False)


@contextlib.contextmanager
def _filled_by(fill: Fill | None) -> Iterator[None]:
    """Inside, from_pretrained has `fill` read the weights; what it does before and after stays its own."""
    from transformers import PreTrainedModel

    if fill is None:
        yield
        return
    own = PreTrainedModel.__dict__["_load_pretrained_model"]

    def load(model: PreTrainedModel, _state: Any, _files: Any, settings: Any, *_: Any) -> tuple[Any, None]:
        return fill(model, settings), None

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = own


def _read_restored(directory: Path) -> Fill:
    tensors = open_weights(directory).tensors
    return lambda model, settings: read_into(model, tensors, settings)


def read_into(model: PreTrainedModel, tensors: Mapping[str, StoredTensor], settings: Any) -> Any:
    """Reads some of a checkpoint's tensors into an empty model, as from_pretrained does it for all: renamed,
    converted, cast and quantised. Returns what it found (LoadStateDictInfo).

    Raises:
        ValueError: a tensor does not fit the model.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model

    found, _ = convert_and_load_state_dict_in_model(model, dict(tensors), settings, None)
    for name, shape, expected in sorted(found.mismatched_keys):
        raise ValueError(f"'{name}' is {tuple(shape)} in the checkpoint and {tuple(expected)} in the model")
    for name, reason in found.conversion_errors.items():
        raise ValueError(f"'{name}' cannot be made of the checkpoint's tensors: {reason.splitlines()[-1]}")
    return found


def choose_attention(model: PreTrainedModel, attention: str) -> None:
    """With `auto`, gives the model linchain's own attention if that suits it."""
    if attention == "auto":
        own = FLAT_SDPA if model.config._attn_implementation == "sdpa" else GROUPED
        with changing_nothing(model):
            use_attention(model, own)


def _generation_config(directory: Path, config: PretrainedConfig) -> GenerationConfig | None:
    """None, which leaves it to transformers; the special tokens alone where generation_config.json holds what
    transformers refuses, because a model that is trained or compared need not generate."""
    from transformers import GenerationConfig

    if not (directory / "generation_config.json").is_file():
        return None
    try:
        GenerationConfig.from_pretrained(directory)
    except Exception as error:  # settings of a wrong type make it raise anything
        logger.warning(
            "%s/generation_config.json is invalid and left aside: %s", directory, first_line(error)
        )
        return GenerationConfig.from_model_config(config)
    return None


def _keep_differentiable(model: PreTrainedModel) -> None:
    """On CPUs with AVX512-BF16, bitsandbytes repacks a 4-bit weight in the first forward in eval mode, for a
    kernel that has no backward: the gradient would end there, with no more than a warning."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _keep_unscaled(model: PreTrainedModel) -> None:
    """RWKV halves some weights in place in its first forward in eval mode, and the hidden states to match, so
    that float16 does not overflow. A chain beside such a weight would not be the checkpoint's."""
    if getattr(model.config, "rescale_every", 0):
        model.config.rescale_every = 0


def _quantization_config(name: str, dtype: torch.dtype, storage: torch.dtype) -> BitsAndBytesConfig | None:
    if name == "none":
        return None
    from transformers import BitsAndBytesConfig

    # bitsandbytes remarks on every product that it casts its input, and on kernels that it did not find.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )


def refuse_incomplete(directory: Path, missing: Iterable[str]) -> None:
    """transformers fills weights that a checkpoint lacks with random numbers and only warns."""
    missing = sorted(missing)
    if missing:
        raise InputError(
            f"{directory}: the checkpoint lacks {len(missing)} of the model's weights, first '{missing[0]}'. "
            "It is incomplete, or config.json belongs to another model."
        )


def _refuse_rounded_head(model: PreTrainedModel, quantization: str) -> None:
    head = model.get_output_embeddings()
    if quantization != "none" and head is not None and not head.weight.is_floating_point():
        raise LinchainError("the output head was quantised; it must keep its precision")


@torch.no_grad()
def _refuse_weights_read_apart(model: PreTrainedModel, quantization: str) -> None:
    """Mamba multiplies by a layer's weight itself, without asking the layer, which alone can restore it."""
    try:
        with quiet():
            model(input_ids=probe_ids(model, 1, 3))
    except REFUSALS as error:
        raise InputError(
            f"model.quantization: {type(model).__name__} cannot compute with weights in {quantization}"
            f" ({first_line(error).rstrip('.')}). Leave model.quantization out."
        ) from error


@contextlib.contextmanager
def loading_problems(directory: Path, attention: str) -> Iterator[None]:
    """Turns what from_pretrained raises into one message that names the file or the option."""
    import pickle

    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        damaged = _first_damaged(weight_files(directory)) or directory
        raise InputError(f"{damaged} is damaged ({first_line(error)}). Download or copy it again.") from error
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{directory}: the pickled weights (.bin) are damaged or hold more than tensors, which could run "
            "code; refused. Use a checkpoint with safetensors files."
        ) from error
    except UNUSABLE as error:
        if is_out_of_memory(error):
            raise LinchainError(
                f"{directory} does not fit into memory. Try model.dtype=auto or model.quantization=nf4."
            ) from error
        if (
            attention != "auto"
            and isinstance(error, (ImportError, ValueError))
            and "attention" in str(error).lower()
        ):
            raise InputError(
                f"model.attention: '{attention}' cannot be used here: {first_line(error)}"
            ) from error
        raise InputError(f"{directory} cannot be loaded: {first_line(error)}") from error


def _first_damaged(files: list[Path]) -> Path | None:
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                handle.keys()
        except SafetensorError:
            return file
    return None
