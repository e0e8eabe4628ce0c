"""What a checkpoint's config.json says: the model's class, its modules and shapes without values, and which
part of it is the text decoder. Models that linchain does not train are refused here.

No code that comes with a model is ever run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from linchain_cli.errors import InputError, LinchainError, did_you_mean, first_line
from linchain_cli.model.classifier import Outputs, is_classifier, refuse_unless_classifier
from linchain_cli.model.files import read_config
from linchain_cli.model.packed import quantization_method
from linchain_cli.model.quiet import quiet

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

# What model classes raise if a configuration's values do not fit together, or a library they need is missing.
UNUSABLE = (
    ImportError,
    ValueError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    RuntimeError,
    OSError,
    EOFError,
)


def load_config(directory: Path, outputs: Outputs | None = None) -> PretrainedConfig:
    """The checkpoint's configuration, without what it says of quantised weights: they are read restored. With
    `outputs` it is that of a sequence classifier on the checkpoint.

    Raises:
        InputError: it is no decoder-only language model (or can be no classifier), or is quantised in a form
        that cannot be restored.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    directory = Path(directory)
    raw = read_config(directory)
    kind = raw["model_type"]
    if kind not in CONFIG_MAPPING_NAMES:
        import transformers

        if "auto_map" in raw:
            raise InputError(
                f"{directory}: '{kind}' comes with its own Python code, and linchain runs no code that comes "
                "with a model. "
                "Use a model that transformers implements itself."
            )
        raise InputError(
            f"{directory}/config.json: transformers {transformers.__version__} has no model type '{kind}'. "
            f"A newer transformers may have it.{did_you_mean(kind, CONFIG_MAPPING_NAMES)}"
        )
    quantization_method(raw, directory)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a strict configuration class may reject a field with any exception type
        raise InputError(
            f"{directory}/config.json is not a valid configuration: {first_line(error)}"
        ) from error
    if outputs is None:
        _refuse_unless_decoder(config, directory)
    else:
        refuse_unless_classifier(config, directory)
        outputs.configure(config)
    for part in (config, config.get_text_config()):  # for it is read restored
        if getattr(part, "quantization_config", None) is not None:
            del part.quantization_config
    return config


def stored_outputs(directory: Path) -> Outputs:
    """What the classifier of a checkpoint tells, as its config.json says."""
    from transformers import AutoConfig

    with quiet():
        return Outputs.of(AutoConfig.from_pretrained(directory, trust_remote_code=False))


def _refuse_unless_decoder(config: PretrainedConfig, directory: Path) -> None:
    kind = config.model_type
    wanted = "linchain trains decoder-only language models (Llama, Qwen, Gemma, GPT-2 and the like)."
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{directory}: '{kind}' is an encoder-decoder model; {wanted}")
    causal, masked, multimodal = _mapping_names()
    if kind in masked and not getattr(config, "is_decoder", False) and not getattr(config, "causal", False):
        raise InputError(
            f"{directory}: '{kind}' is an encoder, which sees the tokens it should predict; {wanted} Encoders"
            " learn to tell classes: task: classification."
        )
    if kind not in causal and not (kind in multimodal and _has_text_part(config)):
        raise InputError(f"{directory}: '{kind}' is not such a language model; {wanted}")


def _mapping_names() -> tuple[dict, dict, dict]:
    from transformers.models.auto import modeling_auto

    return (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )


def _has_text_part(config: PretrainedConfig) -> bool:
    return config.get_text_config(decoder=True) is not config


def auto_class(config: PretrainedConfig, outputs: Outputs | None = None) -> type[_BaseAutoModelClass]:
    """transformers' class that loads a model of this configuration, or a classifier with these outputs."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )

    if outputs is not None:
        return AutoModelForSequenceClassification
    causal, _, multimodal = _mapping_names()
    # A multimodal checkpoint keeps its other towers: its own class, where the causal one would drop them.
    if config.model_type in multimodal and _has_text_part(config):
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def empty_model(directory: Path, outputs: Outputs | None = None) -> PreTrainedModel:
    """The model's modules and shapes on the meta device, weights tied; only the configuration is read.
    With `outputs` it is a sequence classifier."""
    config = load_config(directory, outputs)
    try:
        with quiet(), torch.device("meta"):
            model = auto_class(config, outputs).from_config(config, trust_remote_code=False)
    except UNUSABLE as error:
        raise InputError(
            f"{directory}: no model can be built from config.json: {first_line(error)}"
        ) from error
    model.tie_weights()
    return model.eval().requires_grad_(False)


def text_decoder_prefix(model: nn.Module) -> str:
    """The dotted path of the part whose modules may carry adapters; "" (all) unless multimodal or a
    classifier.

    It is `model.language_model` for Gemma 3 or Qwen2-VL: vision and audio towers and projectors stay outside.
    Of a classifier it is what its head stands on.
    """
    if not _has_text_part(model.config):
        return model.base_model_prefix if is_classifier(model) else ""
    decoder = model.get_decoder()
    for path, module in model.named_modules():
        if module is decoder:
            return path
    raise LinchainError(f"cannot tell which part of {type(model).__name__} is the text decoder")


def text_decoder(model: nn.Module) -> nn.Module:
    """The module at `text_decoder_prefix(model)`."""
    return model.get_submodule(text_decoder_prefix(model))
