"""Configurations of other tools: known as such, and converted to recipes that say the same."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import yaml

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, convert_recipe, load_recipe, strict_yaml
from linchain_cli.recipe.chat_templates import CHAT_TEMPLATES
from linchain_cli.recipe.conversion import converted
from linchain_cli.recipe.other_tools import CALLED_HERE, NOT_THERE, SAID_OTHERWISE
from linchain_cli.recipe.validation import check, dotted_fields

from .theirs import AXOLOTL, LLAMA_FACTORY, TRL, V1


def test_a_configuration_of_axolotl(convert):
    text, recipe = convert(AXOLOTL)
    assert yaml.safe_load(text) == {
        "name": "my-run",
        "output_dir": "outputs",
        "model": {"path": "org/model", "quantization": "nf4"},
        "adapter": {"rank": 32, "depth": 0, "alpha": 16, "target_modules": "all-linear"},
        "data": {
            "train": [
                {"path": "rows.jsonl", "split": "train", "template": "alpaca"},
                {"path": "org/chats", "config": "en", "template": "chat", "columns": {"messages": "turns"}},
                "old.jsonl",
            ],
            "validation": "5%",
            "max_length": 4096,
            "on_long_row": "drop",
        },
        "training": {
            "epochs": 2,
            "global_batch_size": 8,
            "learning_rate": 2e-4,
            "lr_scheduler": "cosine",
            "warmup_steps": 0.1,
            "weight_decay": 0.0,
            "optimizer": "adamw",
            "gradient_checkpointing": True,
            "eval_every": "epoch/4",
            "save_every": "epoch",
            "keep": "last",
            "trackers": ["wandb"],
        },
    }
    assert recipe.model.attention == "auto"
    assert "  global_batch_size: 8  # of 4096 tokens each there: times the rows that fit into that" in text
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        "# Made from theirs.yaml. What Axolotl does by default is written out where it changes the",
        "# result; the rest has linchain's defaults: see `linchain check`.",
        "# Not said above:",
        "#   old.jsonl: type: jeopardy  (not here: rows go by their columns, see data.template)",
        "#   old.jsonl: shards: 3  (split: train[:10%] beside the path takes a part)",
        "#   old.jsonl: message_property_mappings: {role: who}  "
        "(turns have role and content, or from and value: rename them)",
        "#   wandb_project: mine  (WANDB_PROJECT in the environment)",
        "# Not needed: tf32",
    ]


def test_a_configuration_of_llama_factory(convert):
    text, recipe = convert(LLAMA_FACTORY)
    assert (recipe.name, recipe.output_dir) == ("sft", "saves/run")
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (8, 16), "alpha is twice the rank if it is left out"
    assert recipe.adapter.target_modules == ["q_proj", "v_proj"] and recipe.model.dtype == "bfloat16"
    assert [(source.path, source.max_rows) for source in recipe.data.train] == [("one", 1000), ("two", 1000)]
    assert (recipe.data.validation, recipe.training.keep) == (0, "last")
    assert (recipe.training.global_batch_size, recipe.training.trackers) == (8, [])
    assert "#   neftune_noise_alpha: 5  (not here: noise on embeddings (NEFTune))" in text
    assert (
        "#   template: llama3  (the template that the model's tokenizer brings is used; if there is none, "
        in text
    )
    assert "data.chat.template: llama3)" in text


def test_a_configuration_of_trl(convert):
    _, recipe = convert(TRL)
    assert recipe.adapter.alpha == 256, "64 / √16 is 256 / 16"
    assert (recipe.training.max_steps, recipe.training.epochs) == (100, None)
    assert (recipe.training.eval_every, recipe.training.keep) == ("epoch", "best")
    assert recipe.training.trackers == ["wandb", "tensorboard"] and recipe.data.train_on_inputs
    assert recipe.name == "theirs"
    assert [(source.path, source.config) for source in recipe.data.train] == [("org/rows", "en")]


ASKS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request."
)
# What a setting means there, beside the three configurations above.
A, L, T = AXOLOTL, LLAMA_FACTORY, TRL


@pytest.mark.parametrize(
    "base, changed, expected",
    [
        # what they do where nothing is said
        (A, "num_epochs:", {"training.epochs": 1}),
        (A, "warmup_ratio:", {"training.warmup_steps": 0.03}),
        (A, "lr_scheduler:", {"training.lr_scheduler": "cosine"}),
        (A, "cosine_min_lr_ratio: 0.1", {"training.lr_scheduler": "cosine", "training.min_lr_ratio": 0.1}),
        (A, "lr_scheduler: linear\ncosine_min_lr_ratio: 0.1", {"training.min_lr_ratio": 0.0}),
        (
            T,
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.2}",
            {"training.lr_scheduler": "cosine", "training.min_lr_ratio": 0.2},
        ),
        (A, "chat_template: chatml", {"data.chat.template": CHAT_TEMPLATES["chatml"]}),
        (A, "chat_template: llama4", {"data.chat.template": None}),
        (L, "template: llama3", {"data.chat.template": None}),
        (A, "sequence_len:", {"data.max_length": 512}),
        (A, "val_set_size:", {"data.validation": 0}),
        (L, "finetuning_type:", {"adapter.rank": 8, "adapter.dropout": 0}),
        (L, "lora_rank:", {"adapter.rank": 8, "adapter.alpha": 16}),
        (L, "learning_rate:", {"training.learning_rate": 5e-5}),
        (L, "per_device_train_batch_size:", {"training.global_batch_size": 64}),
        (L, "val_size:", {"data.validation": 0}),
        (T, "lora_r:", {"adapter.rank": 16, "adapter.dropout": 0.05}),
        (T, "max_length:", {"data.max_length": "auto"}),
        (T, "max_length:\nmax_seq_length: 512", {"data.max_length": 512}),
        (T, "learning_rate:", {"training.learning_rate": 2e-5, "training.warmup_steps": 0}),
        (T, "load_best_model_at_end:", {"training.keep": "last"}),
        # batches
        (A, "batch_size: 32", {"training.global_batch_size": 32, "training.micro_batch_size": None}),
        (T, "gradient_accumulation_steps: 4", {"training.global_batch_size": 32}),
        (A, "sample_packing: false", {"training.micro_batch_size": 2}),
        (A, "auto_find_batch_size: true", {"training.micro_batch_size": "auto"}),
        # schedules: a number of steps comes before a share, and `constant` has no warm-up
        (A, "warmup_steps: 10", {"training.warmup_steps": 10}),
        (A, "warmup_steps: 0", {"training.warmup_steps": 0}),
        (A, "warmup_steps: 0\nwarmup_ratio:", {"training.warmup_steps": 0}),
        (T, "warmup_steps: 0\nwarmup_ratio: 0.1", {"training.warmup_steps": 0.1}),
        (L, "lr_scheduler_type: constant", {"training.lr_scheduler": "constant", "training.warmup_steps": 0}),
        (L, "lr_scheduler_type: constant_with_warmup", {"training.warmup_steps": 0.1}),
        (L, "lr_scheduler_type: cosine_with_restarts", {"training.lr_scheduler": "cosine"}),
        (A, "max_steps: -1", {"training.epochs": 2, "training.max_steps": None}),
        (A, "optimizer: ao_adamw_8bit", {"training.optimizer": "adamw"}),
        # how often: the strategy `epoch` counts whatever stands beside it, a share is one of the run
        (T, "eval_steps: 500", {"training.eval_every": "epoch"}),
        (T, "save_strategy: epoch", {"training.save_every": "epoch"}),
        (T, "save_steps: 0.1", {"training.save_every": 10}),
        (L, "save_steps: 0.1", {"training.save_every": "epoch/3"}),
        (T, "metric_for_best_model: eval_loss", {"training.best_by": "loss"}),
        # modules
        (A, "lora_target_modules: [q_proj]", {"adapter.target_modules": "all-linear"}),
        (L, "lora_target: q_proj", {"adapter.target_modules": ["q_proj"]}),
        (T, "lora_target_modules: [q_proj]", {"adapter.target_modules": ["q_proj"]}),
        (T, "lora_target_modules: .*layers.[0-3].*proj", {"adapter.target_modules": ".*layers.[0-3].*proj"}),
        (
            T,
            "lora_target_modules: [q_proj]\nlora_target_parameters: [mlp.experts.down_proj]",
            {"adapter.target_modules": ["q_proj", "mlp.experts.down_proj"]},
        ),
        # memory and numbers
        (A, "gradient_checkpointing: offload", {"training.offload_activations": True}),
        (A, "activation_offloading: legacy", {"training.offload_activations": True}),
        (A, "load_in_8bit: false", {"model.quantization": "nf4"}),
        (T, "bf16: true\nfp16: false\ndtype: float32", {"model.dtype": "bfloat16"}),
        (T, "torch_dtype: torch.float16", {"model.dtype": "float16"}),
        (T, "model_revision: 0123456", {"model.revision": "0123456"}),
        (T, "output_dir: out/1e5", {"name": "1e5"}),
        (T, "warmup_ratio: .1", {"training.warmup_steps": 0.1}),
        (T, "weight_decay: 0.10", {"training.weight_decay": 0.1}),
        # rows
        (A, "excess_length_strategy: truncate", {"data.on_long_row": "cut"}),
        (A, "val_set_size: 500", {"data.validation": 500}),
        (L, "val_size: 500.0", {"data.validation": 500}),
        (A, "test_datasets: [{path: t.jsonl}]\nval_set_size:", {"data.validation": {"path": "t.jsonl"}}),
        (
            L,
            "eval_dataset: a.json,b.json\nval_size:\nmax_samples:",
            {"data.validation": [{"path": "a.json"}, {"path": "b.json"}]},
        ),
        (
            L,
            "adapter_name_or_path: mine\nlora_rank:\nlora_target:",
            {"adapter.init_from": "mine", "adapter.rank": 16},
        ),
        (
            T,
            "dataset_test_split: held",
            {"data.validation": {"path": "org/rows", "config": "en", "split": "held"}},
        ),
        (T, "eval_strategy: 'no'\nload_best_model_at_end:", {"data.validation": 0}),
        (
            L,
            "eval_dataset: org/held\nval_size:\nmax_samples:",
            {"data.validation": {"path": "org/held", "split": "train"}},
        ),
        (T, "dataset_text_field: body", {"data.columns": {"text": "body"}}),
        (T, "dataset_text_field: text\nrandom_state: 3", {"data.columns": {}, "seed": 3}),
        (L, "template: qwen", {"data.template": "chat"}),
        (
            L,
            "template: alpaca",
            {
                "data.template": {
                    "prompt": f"{ASKS}\n\n### Instruction:\n{{instruction}}\n{{input}}\n\n### Response:\n",
                    "prompt_no_input": f"{ASKS}\n\n### Instruction:\n{{instruction}}\n\n### Response:\n",
                    "response": "{output}",
                }
            },
        ),
        (L, "stage: pt", {"data.template": "text"}),
        (L, "mask_history: true", {"data.turns": "last"}),
        (L, "train_on_prompt: true", {"data.train_on_inputs": True}),
        # TRL's two keys are about rows of two kinds, each of which it tells apart by itself
        (T, "completion_only_loss: true", {"data.train_on_inputs": False}),
        (T, "completion_only_loss: false\nassistant_only_loss: true", {"data.train_on_inputs": False}),
        (T, "completion_only_loss: false\nassistant_only_loss:", {"data.train_on_inputs": True}),
        (T, "assistant_only_loss:", {"data.train_on_inputs": False}),
        # what a script leaves out is PEFT's or Unsloth's default, not that of TRL's command line
        (T, "lora_r:\nr: 32\nlora_alpha:\nuse_rslora:", {"adapter.alpha": 8, "adapter.dropout": 0}),
        (
            T,
            "lora_r:\nr: 32\nlora_alpha:\nuse_rslora:\nuse_gradient_checkpointing: unsloth",
            {"adapter.alpha": 16, "adapter.dropout": 0, "adapter.rank": 32},
        ),
        (L, "lora_rank:\nr: 32", {"adapter.alpha": 8, "adapter.dropout": 0}),
        (L, "enable_thinking: false", {"data.chat.options": {"enable_thinking": False}}),
        # LLaMA-Factory's second form
        (
            V1,
            "",
            {
                "model.path": "org/model",
                "model.quantization": "nf4",
                "adapter.rank": 4,
                "adapter.alpha": 8,
                "adapter.dropout": 0.05,
                "adapter.target_modules": "all-linear",
                "data.template": "chat",
                "training.lr_scheduler": "constant",
                "training.global_batch_size": 2,
                "training.save_every": "epoch/2",
            },
        ),
        (V1, "global_batch_size: 16", {"training.global_batch_size": 16}),
        (V1, "lr_scheduler_config: {name: linear, warmup_ratio: 0.2}", {"training.warmup_steps": 0.2}),
    ],
)
def test_what_a_setting_means_there(convert, base, changed, expected):
    keys = {line.partition(":")[0] for line in changed.splitlines()}
    kept = [line for line in base.splitlines() if line.partition(":")[0] not in keys]
    _, recipe = convert("\n".join([*kept, changed]))
    flat = recipe.flat()
    for field, value in expected.items():
        assert (_set(flat[field]) if field in flat else _section(flat, field)) == value, field


def _section(flat: dict, field: str) -> dict:
    """A mapping that `flat` takes apart."""
    below = {
        key.removeprefix(f"{field}."): value for key, value in flat.items() if key.startswith(f"{field}.")
    }
    return _set(below)


def _set(value: Any) -> Any:
    """Without what mappings leave open."""
    if isinstance(value, list):
        return [_set(item) for item in value]
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None and key != "weight"}
    return value


@pytest.mark.parametrize(
    "line, said",
    [
        ("optim: galore_adamw", "#   training.optimizer: galore_adamw  (expected adamw, got 'galore_adamw'"),
        (
            "lr_scheduler_type: polynomial",
            "training.lr_scheduler: polynomial  (expected one of linear, cosine",
        ),
        ("finetuning_type: full", "#   all weights are trained there, with a rate for that"),
        ("rl: dpo", "# Not said above:\n#   rl: dpo  (not here: what is learned is the rows' answers)\n"),
        ("layers_to_transform: [1, 2]", "(adapter.target_modules takes a regular expression over"),
        (
            "lora_model_dir: old",
            "#   adapter.init_from: first `linchain import old --out NEW`, then name NEW",
        ),
        (
            "stage: dpo",
            "# Not said above:\n#   stage: dpo  (not here: what is learned is the rows' answers)\n",
        ),
        ("something: 3", "#   something: 3  (linchain does not know it)"),
        (
            "load_in_4bit: true\nbnb_4bit_quant_type: fp4",
            "#   bnb_4bit_quant_type: fp4  (not here: model.quantization is nf4 or int8)",
        ),
        ("quantization_bit: 4\nquantization_method: hqq", "#   quantization_method: hqq  (not here: model"),
        ("load_in_4bit: true\nbnb_4bit_quant_type: nf4", "  keep: best\n  trackers:\n"),
        ("max_length:", "#   max_length: null  (no row is cut there; auto, as here, is at most 2,048)"),
        ("packing: true", "#   data.train_on_inputs: of prompts with completions TRL learns these alone"),
        ("assistant_only_loss:", "#   data.train_on_inputs: TRL learns conversations whole, as true does"),
        ("r: 8\nlora_r:\nlora_alpha:\nuse_rslora:", "  alpha: 8  # PEFT's, where nothing is said"),
        ("use_dora: false", "# Not needed: use_dora"),
        ("save_strategy: best", "#   training.save_every: best  (not here: a number of steps, or epoch)"),
        ("lr_scheduler_type: cosine_with_min_lr", "cosine_with_min_lr  (not here: cosine is the nearest)"),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5}",
            "(training.min_lr_ratio takes a share of learning_rate)",
        ),
        (
            "chat_template: llama4",
            "brings is used; if there is none, data.chat.template: chatml, llama3, gemma or a",
        ),
        ("optim: lion_32bit", "#   training.optimizer: lion_32bit  (expected adamw, got 'lion_32bit'"),
        (
            "plugins: [axolotl.integrations.kd.KDPlugin]",
            "#   plugins: axolotl.integrations.kd.KDPlugin  (not here)",
        ),
        ("plugins: [axolotl.integrations.liger.LigerPlugin]", "  keep: best\n  trackers:\n"),
        ("run_name: a\noutput_dir: runs/b", "#   name: a  (a run is called after its output_dir)"),
        ("adam_beta2: 0.95", "#   adam_beta2: 0.95  (not here: AdamW is the only optimizer, with betas"),
        ("adam_beta2: 0.999", "# Not needed: adam_beta2"),
        ("model_name: other", "#   model_name: other  (another of these keys has become model.path)"),
        ("lora_dropout: ${oc.env:DROPOUT}", "(nothing is put in for ${...}: write the value out)"),
        (
            "quantization_config: {a: [b]}",
            "#   model.quantization: {a: [b]}  (expected one of none, int8, nf4",
        ),
        ("dataset: {path: x.json, note: [1]}", "data:\n  train: x.json\n"),
    ],
)
def test_what_a_recipe_cannot_say_is_told_beneath_it(convert, line, said):
    given = [new.partition(":")[0] for new in line.splitlines()]
    kept = [old for old in TRL.splitlines() if old.partition(":")[0] not in given]
    if line.startswith("dataset:"):
        kept = [old for old in kept if not old.startswith("dataset_")]
    text, _ = convert("\n".join([*kept, line]))
    assert said in text


def test_what_is_missing_is_told(tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text("lora_r: 8\nlora_alpha: 16\nlora_dropout: 0.1\n")
    assert "# Missing: model.path\n# Missing: data.train\n" in convert_recipe(path)


VALUES = [
    *(
        "true",
        "false",
        "0",
        "1",
        "-1",
        "0.5",
        "1e-4",
        "nan",
        "x",
        "",
        "a,b",
        "epoch",
        "5%",
        "../..",
        "\n",
        None,
    ),
    *([], ["a", "b"], [None], [["a"]], {"a": "b"}, {"a": ["b"]}, [{}], [{"path": "a"}], {"path": {"x": "y"}}),
    [{"path": "a", "type": {"field_input": ["x"]}, "columns": "q"}],
]


def test_whatever_is_written_becomes_a_recipe_that_only_lacks_something():
    random = Random(1)
    keys = [
        key for key in (*CALLED_HERE, *SAID_OTHERWISE, *NOT_THERE, *dotted_fields(Recipe)) if "*" not in key
    ]
    of_entries = "path type name split data_files roles train_on_eos field_messages shards weight".split()
    keys += ["output_dir", "micro_batch_size", "optimizer", "max_steps", "seed", "data", "training"]
    for _ in range(300):
        config = {random.choice(keys): random.choice(VALUES) for _ in range(random.randint(1, 12))}
        if random.random() < 0.5:
            entry = {random.choice(of_entries): random.choice(VALUES) for _ in range(random.randint(1, 4))}
            config |= {"base_model": "m", "datasets": [entry]}
        _, problems = check(Recipe, strict_yaml.parse(converted(config, "theirs.yaml")).value)
        assert all(problem.missing for problem in problems), config


@pytest.mark.parametrize("text", [AXOLOTL, LLAMA_FACTORY, TRL])
def test_a_whole_configuration_is_told_in_one_sentence(tmp_path, text):
    path = tmp_path / "the irs.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(path, ["name=x"])
    first = next(line.partition(":")[0] for line in text.splitlines() if line)
    assert str(caught.value).startswith(f"{path}: a configuration of another tool ({first}, ")
    assert f"`linchain recipes convert '{path}'` writes it as one" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, said",
    [
        ("name: x\nrank: 8\nmodel: {path: m}\n", "no configuration of Axolotl, LLaMA-Factory or TRL"),
        ("lora_r: 8\nlora_r: 9\nlora_alpha: 3\nbase_model: m\n", ":2: lora_r: given twice; first in line 1"),
        ("- a\n", "a configuration that can be converted is a mapping that begins like `base_model: "),
        ("", "the file is empty"),
        ("base_model: &m a\nlora_r: 8\nother: *m\n", "aliases such as \\*m are not allowed"),
    ],
)
def test_what_cannot_be_converted(tmp_path, text, said):
    path = tmp_path / "theirs.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        convert_recipe(path)
