"""What a recipe holds, as pydantic models.

Every field is documented once, by the text beneath it: `linchain recipes schema`, docs/recipe.md and the
error messages are made from these declarations.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, StringConstraints, model_validator

from linchain_cli.recipe.data import DataConfig
from linchain_cli.recipe.dotted import flat, nested
from linchain_cli.recipe.fields import Count, CountFromZero, FileName, Text, number_or_auto
from linchain_cli.recipe.validation import Conflict, Expected, StrictModel, choose, tagged
from linchain_cli.storage import expand


class ModelConfig(StrictModel):
    """The base model, which stays frozen."""

    path: Annotated[Text, Expected("a hub id, a local directory or a .gguf file")]
    """Hub id, local checkpoint directory, or .gguf file (converted to a directory once)."""
    revision: Text | None = None
    """Branch, tag or commit on the hub; null takes the default branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the frozen base. auto: bfloat16 where the device computes in it, else float16 on a GPU
    and float32 on a CPU. Adapters are float32 always. In float16 the loss is scaled as far as its gradients
    allow."""
    quantization: Literal["none", "int8", "nf4"] = "none"
    """Keep the frozen base in 8 or 4 bit (bitsandbytes). Merging goes into the original weights."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation; auto takes the fastest that the device has."""

    def conflicts(self) -> Iterator[Conflict]:
        if self.attention == "flash_attention_2" and self.dtype == "float32":
            yield Conflict(
                ("attention", "dtype"),
                "flash_attention_2 computes in 16 bit: set dtype to auto, bfloat16 or float16.",
            )


def _kind_of_targets(value: Any) -> str:
    return "list" if isinstance(value, (list, tuple)) else "text"


def _regex(value: str) -> str:
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {error}") from None
    return value


Targets = Annotated[
    tagged(Annotated[list[Text], Field(min_length=1)], "list")
    | tagged(Annotated[Text, AfterValidator(_regex)], "text"),
    choose(_kind_of_targets),
    Expected("a list of module names, a regular expression, or all-linear"),
]


class AdapterConfig(StrictModel):
    """The chain: h = W0 x + (alpha / rank) · B · Wn · … · W1 · A · x, with n = depth."""

    rank: Annotated[int, Field(ge=1, le=2**16)] = 16
    """Rows of A, columns of B, and both sides of every link."""
    depth: Annotated[int, Field(ge=0, le=1000)] = 3
    """Number of rank x rank links between A and B: 0 is LoRA, 1 is MoSLoRA."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The chain's output is multiplied by alpha / rank."""
    scale: Literal["alpha", "match"] = "alpha"
    """match gives back what links lose at their start, so that a chain begins at LoRA's scale: with kaiming
    links alpha counts √3 times as much for each of them, with others nothing changes. chain.json holds the
    alpha that results."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the chain's input while training. 0 allows the fast path."""
    init: Literal["orthogonal", "identity", "kaiming"] = "orthogonal"
    """How links start. orthogonal and identity keep LoRA's scale at any depth; kaiming is the paper's. B
    starts at zero."""
    target_modules: Targets = "all-linear"
    """Linear modules of the text decoder that get a chain: all-linear (all but the output head), a list of
    names (all-linear may be one), or one regular expression over the full module path. A name that matches
    nothing is an error. The paper's are [q_proj, k_proj, v_proj, up_proj, down_proj].
    Routed experts get chains, one on each matrix of each expert, where they are named: `experts.down_proj`,
    or `experts` for all their matrices. check and train say what share of the weights a choice leaves out."""
    init_from: Text | None = None
    """A run, one of its checkpoints or another adapter directory, whose values training starts from."""


Factor = Annotated[float, Field(ge=0)]


class LearningRateFactors(StrictModel):
    """Factors on learning_rate for the parts of what is trained; 0 keeps a part as it was initialised."""

    A: Factor = 1.0
    """Factor for A."""
    links: Factor = 1.0
    """Factor for the links."""
    B: Factor = 1.0
    """Factor for B."""
    head: Factor = 1.0
    """Factor for the head of a classification or regression, which is trained whole."""


def _kind_of_warmup(value: Any) -> str:
    try:
        return "share" if 0 < float(value) < 1 else "steps"
    except (TypeError, ValueError):
        return "steps"


WarmUp = Annotated[
    tagged(CountFromZero, "steps") | tagged(Annotated[float, Field(gt=0, lt=1)], "share"),
    choose(_kind_of_warmup),
    Expected("a whole number of at least 0, or a share of the run below 1"),
]


LearningRate = Annotated[
    tagged(Annotated[float, Field(gt=0, le=1)], "number") | tagged(Literal["auto"], "auto"),
    choose(number_or_auto),
    Expected("a number above 0 and up to 1, or auto"),
]
_ROWS_ON_CPU = 4
MicroBatch = Annotated[
    tagged(Count, "number") | tagged(Literal["auto"], "auto"),
    choose(number_or_auto),
    Expected("a whole number of at least 1, auto"),  # or null, as its field says
]


def _steps_or_epochs(value: Any) -> str:
    return "epochs" if str(value).startswith("epoch") else "steps"


Every = Annotated[
    tagged(Count, "steps")
    | tagged(Annotated[str, StringConstraints(pattern=r"^epoch(/[1-9]\d{0,3})?$")], "epochs"),
    choose(_steps_or_epochs),
    Expected("a whole number of steps, epoch, or epoch/4 for four times an epoch"),
]
BestBy = Literal["auto", "loss", "accuracy", "f1", "matthews", "pearson", "spearman"]
Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "aim", "clearml", "comet_ml", "dvclive", "swanlab", "trackio"
]


class TrainingConfig(StrictModel):
    """Length, batches, optimizer, and what is logged and kept."""

    epochs: Annotated[float, Field(gt=0, le=10**6)] | None = 3.0
    """Passes over the training rows. Give this or max_steps."""
    max_steps: Count | None = None
    """Optimizer steps; takes the place of epochs."""
    global_batch_size: Count = 16
    """Rows per optimizer step, over all processes and micro-batches."""
    micro_batch_size: MicroBatch | None = None
    """Rows that are in memory at once on each process. auto finds how many tokens fit, which are many short
    rows or few long ones, and takes half as many if memory runs out later. null is auto on a GPU, and 4 rows
    on a CPU. The step's gradient does not depend on it, and it need not divide global_batch_size."""
    learning_rate: LearningRate = 3.0e-4
    """Peak learning rate. auto takes a published one for the task and models of this family and size,
    changed for alpha and for what links lose at their start; check shows it. `linchain tune` finds one by
    training."""
    lr_scheduler: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up: down to min_lr_ratio by the last step (linear, cosine), or
    constant."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The share of learning_rate at which linear and cosine end; 0 goes down to zero."""
    warmup_steps: WarmUp = 0.05
    """Steps over which the learning rate rises from zero: a number of them, or a share of the run below 1."""
    lr_multiplier: LearningRateFactors = LearningRateFactors()
    """Factors on the learning rate of A, links, B and a classifier's head."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """AdamW's decoupled weight decay; biases and norms of a classifier's head have none. Links decay to zero
    as A and B do, not to what they began as."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """The gradient's norm over all adapters is cut down to this; null leaves it alone."""
    optimizer: Annotated[Literal["adamw"], Expected("adamw")] = "adamw"
    """AdamW, with its state in 32 bit: beside a base it is small."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, with less memory."""
    offload_activations: bool = False
    """With gradient_checkpointing on a GPU: keep what each block computes again from in main memory, for long
    rows."""
    compile: bool = False
    """torch.compile the model's blocks: some minutes before the first step, faster steps after it."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms on CUDA, which exact resume needs there."""
    parallel: Literal["auto", "replicate", "shard", "hybrid"] = "auto"
    """Several processes: replicate holds the whole base on each, shard spreads it over all (FSDP2), hybrid
    over those of each machine (HSDP). auto shards what does not fit."""
    offload_base: bool = False
    """With shard and hybrid: keep the spread base in main memory; each block is copied to the GPU when it
    computes. Slower, for bases that do not fit otherwise."""
    log_every: Count = 10
    """Steps between rows of metrics.jsonl."""
    eval_every: Every = 200
    """Steps between validation losses, or epoch, or epoch/4 for four times an epoch; there is one after the
    last step in any case."""
    save_every: Every = 200
    """Steps between checkpoints, or epoch, or epoch/4."""
    keep_checkpoints: Count = 2
    """Newest checkpoints kept on disk."""
    keep: Literal["best", "last"] = "best"
    """What adapter/ holds at the end: the values of the best validation, or the last ones; without
    validation rows (data.validation: 0) the last ones, if this is left out."""
    best_by: BestBy = "auto"
    """What tells the best validation: its loss, or how well labels are told (accuracy, f1 and matthews of
    classes; pearson and spearman of numbers). auto: the loss where text is learned, what GLUE goes by for
    its tasks, else accuracy or pearson. Of equal ones the lower loss."""
    early_stopping: Count | None = None
    """Stop after this many validations in a row without a better one; null never stops early."""
    trackers: list[Tracker] = []
    """Experiment trackers that get the metrics too; each needs its own package."""

    @model_validator(mode="before")
    @classmethod
    def _steps_replace_default_epochs(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("max_steps") is not None and "epochs" not in value:
            return {**value, "epochs": None}
        return value

    def rows_at_once(self, device: str) -> int | None:
        """What micro_batch_size means on a device of that kind (cpu, cuda): rows, or None for auto."""
        if self.micro_batch_size is None:
            return _ROWS_ON_CPU if device == "cpu" else None
        return None if self.micro_batch_size == "auto" else self.micro_batch_size

    def conflicts(self) -> Iterator[Conflict]:
        if self.offload_base and self.parallel not in ("shard", "hybrid"):
            yield Conflict(
                ("offload_base", "parallel"),
                "only a spread base is offloaded: set parallel to shard or hybrid.",
            )
        if self.offload_activations and not self.gradient_checkpointing:
            yield Conflict(
                ("offload_activations", "gradient_checkpointing"),
                "what is offloaded is what blocks compute again from: set gradient_checkpointing to true.",
            )
        if self.min_lr_ratio and self.lr_scheduler == "constant":
            yield Conflict(
                ("min_lr_ratio", "lr_scheduler"), "a constant rate has no end to come down to: leave it out."
            )
        if self.epochs is not None and self.max_steps is not None:
            yield Conflict(("epochs", "max_steps"), "give epochs or max_steps, not both.")
        if self.epochs is None and self.max_steps is None:
            yield Conflict(
                ("epochs", "max_steps"), "give epochs or max_steps: how long to train is left open."
            )


Protocol = Literal["likelihood", "generate"]
Task = Literal["causal", "classification", "regression"]
# What can be told of a task's predictions, beside the loss.
METRICS: dict[Task, tuple[str, ...]] = {
    "causal": (),
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("pearson", "spearman"),
}


# What stands before the name, or the file, of a task of lm-evaluation-harness.
HARNESS_PREFIX = "lm_eval:"


class EvaluationConfig(StrictModel):
    """What `linchain train` evaluates when it is done."""

    tasks: list[Text] = []
    """Task names, as `linchain eval --tasks` takes them (lm_eval:NAME among them); none by default. Of a
    classification or regression: labelled rows, as data.train takes them; a data set's split `validation`
    unless it is a file."""
    protocol: Protocol = "likelihood"
    """likelihood compares the options' probabilities; generate lets the model write and reads its answer."""
    limit: Count | None = None
    """Only the first rows of each task."""
    data_dir: Text | None = None
    """Directory of local test files, <task>/test.json in the LLM-Adapters format."""


class Recipe(StrictModel):
    """All that a run is made from."""

    task: Task = "causal"
    """causal: text is learned, token by token. classification, regression: a class or a number is told from
    one text or two, by a head on the base, which may be an encoder (BERT, RoBERTa, DeBERTa-v3, ModernBERT)
    or a decoder."""
    name: FileName
    """The run is written to <output_dir>/<name>."""
    output_dir: Text = "runs"
    """Directory of the runs, relative to the current directory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Adapter initialisation, row order and dropout."""
    model: ModelConfig
    """The base model."""
    adapter: AdapterConfig = AdapterConfig()
    """The chain."""
    data: DataConfig
    """Rows and their text."""
    training: TrainingConfig = TrainingConfig()
    """The optimisation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """What follows training."""

    @model_validator(mode="before")
    @classmethod
    def _open_sections(cls, value: Any) -> Any:
        """A section that is absent, or has all its keys commented out, is an empty one: its missing keys get
        named."""
        if not isinstance(value, Mapping):
            return value
        empty = {name: {} for name in SECTIONS if value.get(name) is None}
        return _with_last_kept({**value, **empty})

    def conflicts(self) -> Iterator[Conflict]:
        yield from self._conflicts_of_task()
        if self.data.validation != 0:
            return
        if self.training.keep == "best":
            keys = ("training.keep", "data.validation")
            yield Conflict(
                keys, "'best' is by validation loss, and data.validation is 0: set training.keep to last."
            )
        if self.training.early_stopping is not None:
            keys = ("training.early_stopping", "data.validation")
            yield Conflict(keys, "early stopping is by validation loss, and data.validation is 0.")

    def _conflicts_of_task(self) -> Iterator[Conflict]:
        best_by = self.training.best_by
        if best_by not in ("auto", "loss", *METRICS[self.task]):
            fitting = ", ".join(("auto", "loss", *METRICS[self.task]))
            yield Conflict(("training.best_by", "task"), f"of task: {self.task} it is one of {fitting}.")
        if self.task == "causal":
            if self.training.lr_multiplier.head != 1:
                keys = ("training.lr_multiplier.head", "task")
                yield Conflict(keys, "task: causal has no head of its own to train.")
            return
        for key, given in (
            ("template", self.data.template != "auto"),
            ("train_on_inputs", self.data.train_on_inputs),
        ):
            if given:
                message = f"it is about answers; rows of task: {self.task} have a label. Leave it out."
                yield Conflict((f"data.{key}", "task"), message)
        if self.task == "regression" and self.data.labels:
            yield Conflict(("data.labels", "task"), "a regression's labels are numbers, not words.")
        if self.model.quantization != "none":
            keys = ("model.quantization", "task")
            yield Conflict(keys, f"task: {self.task} needs an unrounded base: set quantization to none.")
        if self.training.parallel in ("shard", "hybrid"):
            keys = ("training.parallel", "task")
            yield Conflict(keys, f"task: {self.task} needs the base whole on every process: set it to auto.")

    @property
    def run_path(self) -> Path:
        """Where the run is written."""
        return expand(self.output_dir) / self.name

    @property
    def evaluated_by(self) -> str:
        """The protocol of its evaluation: that of written answers, or the task, of labels that are told."""
        return self.evaluation.protocol if self.task == "causal" else self.task

    def flat(self) -> dict[str, Any]:
        """Its values as JSON has them, by dotted key; an empty mapping is a value."""
        return dict(flat(self.model_dump(mode="json")))

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> Recipe:
        """The recipe that values by dotted key make: what `flat` gives, or a part of it.

        Raises:
            ValidationError: pydantic's, for what is no recipe.
        """
        return cls.model_validate(nested(values))

    def to_yaml(self) -> str:
        """The recipe with every default written out. Reading it again gives an equal recipe."""
        return yaml.dump(
            self.model_dump(mode="json"),
            Dumper=_PlainDumper,
            sort_keys=False,
            allow_unicode=True,
            width=2**31,
        )


def _with_last_kept(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Says that the last adapter is kept where nothing validates and nothing else is said."""
    data, training = recipe["data"], recipe["training"]
    if not isinstance(data, Mapping) or not isinstance(training, Mapping) or "keep" in training:
        return recipe
    if not re.fullmatch(r"0+(\.0+)?%?", str(data.get("validation"))):
        return recipe
    return {**recipe, "training": {**training, "keep": "last"}}


SECTIONS = ("model", "adapter", "data", "training", "evaluation")


class _PlainDumper(yaml.SafeDumper):
    """Writes no anchors, which the loader refuses, and escapes line breaks: between single quotes U+0085
    reads as a blank."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_PlainDumper.add_representer(str, _PlainDumper.represent_str)


def json_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
