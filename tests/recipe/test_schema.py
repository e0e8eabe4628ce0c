"""The recipe's models: defaults, the way out to YAML and back, and what is generated from the
declarations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, TrainingConfig, json_schema, load_recipe, strict_yaml
from linchain_cli.recipe.validation import check
from linchain_cli.shipped import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
MINIMAL = {"name": "r", "model": {"path": "m"}, "data": {"train": "d.json"}}

# The defaults are a promise to users: a changed one must be changed here too, and told in CHANGELOG.md.
DEFAULTS = """\
task: causal
output_dir: runs
seed: 42
model: {revision: null, dtype: auto, quantization: none, attention: auto}
adapter: {rank: 16, depth: 3, alpha: 32.0, scale: alpha, dropout: 0.0, init: orthogonal, init_from: null,
          target_modules: all-linear}
data: {split: null, revision: null, columns: {}, validation: auto, split_seed: 42, labels: {}, template: auto,
chat: {template: null, options: {}, system: null}, turns: all, train_on_inputs: false,
       max_length: auto, on_long_row: cut, on_bad_row: error, max_unsupervised_share: 0.0}
training: {epochs: 3.0, max_steps: null, global_batch_size: 16, micro_batch_size: null, learning_rate: 3.0e-4,
           lr_scheduler: linear, min_lr_ratio: 0.0,
           warmup_steps: 0.05, lr_multiplier: {A: 1.0, links: 1.0, B: 1.0, head: 1.0}, weight_decay: 0.0,
           max_grad_norm: 1.0, optimizer: adamw,
           gradient_checkpointing: false, offload_activations: false, compile: false, deterministic: false,
           parallel: auto, offload_base: false, log_every: 10, eval_every: 200,
           save_every: 200, keep_checkpoints: 2, keep: best, best_by: auto, early_stopping: null,
           trackers: []}
evaluation: {tasks: [], protocol: likelihood, limit: null, data_dir: null}
"""


def test_defaults():
    import yaml

    dumped = Recipe(**MINIMAL).model_dump(mode="json")
    expected = yaml.safe_load(DEFAULTS)
    expected["training"]["learning_rate"] = 3e-4
    expected |= {"name": "r"}
    expected["model"]["path"] = "m"
    expected["data"]["train"] = [
        dict.fromkeys(
            ("config", "data_files", "split", "revision", "columns", "max_rows", "labels", "template")
        )
        | {"path": "d.json", "weight": 1.0}
    ]
    assert dumped == expected


def test_models_built_in_python_are_checked_too():
    with pytest.raises(ValidationError, match="not both"):
        Recipe(**MINIMAL, training={"epochs": 1, "max_steps": 1})
    with pytest.raises(ValidationError, match="frozen"):
        Recipe(**MINIMAL).adapter.rank = 3


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=20)
RECIPES = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "model": st.fixed_dictionaries({"path": TEXT, "revision": st.none() | TEXT}),
        "data": st.fixed_dictionaries(
            {
                "train": st.lists(TEXT, min_size=1, max_size=3),
                "columns": st.dictionaries(TEXT, TEXT, max_size=3),
                "validation": st.integers(1, 10**6) | st.just("dev.json"),
                "template": st.sampled_from(["plain", "chat"])
                | st.fixed_dictionaries({"prompt": TEXT, "response": TEXT}),
            }
        ),
        "training": st.fixed_dictionaries(
            {
                "learning_rate": st.floats(0, 1, exclude_min=True),
                "epochs": st.floats(0, 1e6, exclude_min=True, allow_infinity=False),
                "micro_batch_size": st.integers(1, 64) | st.just("auto") | st.none(),
            }
        ),
    }
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(values=RECIPES)
def test_to_yaml_reads_back_equal(values):
    recipe = Recipe(**values)
    again, problems = check(Recipe, strict_yaml.parse(recipe.to_yaml()).value)
    assert not problems and again == recipe


@pytest.mark.parametrize(
    "text", ["\x85", "a\x85b", "\u2028", "\ufeff", "\x7f", "\r\n", "a: b", "*a", "null", "", " ", "é", "#"]
)
def test_to_yaml_keeps_text_that_yaml_would_bend(text):
    recipe = Recipe(
        **MINIMAL
        | {"data": {"train": "d", "template": {"prompt": f"{text}{{input}}", "response": text or "x"}}}
    )
    again, _ = check(Recipe, strict_yaml.parse(recipe.to_yaml()).value)
    assert again == recipe


def test_to_yaml_writes_every_field():
    text = Recipe(**MINIMAL).to_yaml()
    assert strict_yaml.parse(text).value.keys() == Recipe.model_fields.keys()
    assert "early_stopping: null" in text and "&" not in text


def _models(model: type[BaseModel]) -> set[type[BaseModel]]:
    from linchain_cli.recipe.validation import nested_model

    inner = [
        found for declared in model.model_fields.values() if (found := nested_model(declared.annotation))
    ]
    return {model}.union(*map(_models, inner))


@pytest.mark.parametrize("model", sorted(_models(Recipe), key=lambda model: model.__name__))
def test_every_field_is_documented(model):
    assert model.__doc__
    for name, declared in model.model_fields.items():
        assert declared.description and declared.description.rstrip().endswith("."), name


def test_json_schema_describes_what_the_loader_takes():
    schema = json_schema()
    assert schema["additionalProperties"] is False and schema["required"] == ["name", "model", "data"]
    data = schema["$defs"]["DataConfig"]["properties"]
    assert {"type": "string"} in data["train"]["anyOf"] and {"type": "integer"} in data["validation"]["anyOf"]
    assert schema["$defs"]["AdapterConfig"]["properties"]["depth"]["description"]


def test_the_last_is_kept_where_nothing_validates():
    minimal = {"name": "x", "model": {"path": "m"}}
    for rows in (0, "0", "0%"):
        data = {"train": "a.json", "validation": rows}
        assert Recipe(**minimal, data=data).training.keep == "last"
        assert Recipe(**minimal, data=data, training={"epochs": 1}).training.keep == "last"
    assert Recipe(**minimal, data={"train": "a.json", "validation": "5%"}).training.keep == "best"


def test_the_reference_is_up_to_date():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/generate_reference.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid_and_named_like_their_file(name):
    recipe = load_recipe(shipped_recipes()[name])
    assert recipe.name == name


PAPER = [
    name for name in shipped_recipes() if name.endswith("b-commonsense") and not name.startswith("smollm2")
]


def test_there_are_recipes_with_the_papers_hyper_parameters():
    assert {name.partition("-")[0] for name in PAPER} == {"llama2", "llama3", "qwen3", "gemma2"}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyper_parameters(name):
    recipe = load_recipe(shipped_recipes()[name])
    adapter, data, training = recipe.adapter, recipe.data, recipe.training
    assert (adapter.rank, adapter.alpha, adapter.depth, adapter.dropout) == (16, 32, 3, 0.05)
    assert adapter.target_modules == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (training.learning_rate, training.lr_scheduler, training.warmup_steps) == (3e-4, "linear", 100)
    assert (training.global_batch_size, training.micro_batch_size, training.epochs) == (16, None, 3)
    assert (training.eval_every, training.save_every, training.keep) == (200, 200, "best")
    assert (data.validation, data.max_length, data.train_on_inputs) == (120, 256, True)


def test_a_shipped_recipe_takes_overrides():
    with pytest.raises(InputError, match="adapter.depth"):
        load_recipe(shipped_recipes()["figure2"], ["adapter.depth=three"])


@pytest.mark.parametrize(
    "written, value",
    [
        ("false", False),
        ("true", True),
        ("3", 3),
        ("-1.5", -1.5),
        ("1e-5", 1e-5),
        ("null", None),
        ("False", False),
        ("TRUE", True),
        ("nobody", "nobody"),
        ("x", "x"),
    ],
)
def test_an_option_of_the_chat_template_is_what_it_looks_like(written, value):
    found = strict_yaml.parse(f"{{options: {{a: {written}}}}}").value
    recipe, problems = check(Recipe, MINIMAL | {"data": {"train": "d", "template": "chat", "chat": found}})
    assert not problems
    assert recipe.data.chat.options["a"] == value and type(recipe.data.chat.options["a"]) is type(value)


@pytest.mark.parametrize(
    ("written", "meant"), [("no", "false"), ("Off", "false"), ("yes", "true"), ("ON", "true")]
)
def test_an_option_that_every_template_would_take_for_true_is_refused(written, meant):
    found = {"train": "d", "template": "chat", "chat": {"options": {"a": written}}}
    _, (problem,) = check(Recipe, MINIMAL | {"data": found})
    assert problem.key[-2:] == ("options", "a") and f"got '{written}' (write {meant})" in problem.message


NUMBERS = st.integers(-(10**17), 10**17) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT


@settings(max_examples=100, deadline=None, derandomize=True)
@given(options=st.dictionaries(TEXT, SCALARS, max_size=3))
def test_options_of_the_chat_template_are_read_back_equal(options):
    recipe = Recipe(**MINIMAL | {"data": {"train": "d", "template": "chat", "chat": {"options": options}}})
    again, problems = check(Recipe, strict_yaml.parse(recipe.to_yaml()).value)
    assert not problems and again == recipe


def test_a_chat_template_s_file_is_kept_in_the_recipe(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}\n{{ m.content }}\t\u2028{% endfor %}")

    def recipe(template):
        return check(
            Recipe, MINIMAL | {"data": {"train": "d", "template": "chat", "chat": {"template": template}}}
        )

    found, problems = recipe(str(file))
    assert not problems and found.data.chat.template == file.read_text()
    file.unlink()
    assert check(Recipe, strict_yaml.parse(found.to_yaml()).value) == (found, [])
    _, (problem,) = recipe(str(file))
    assert (
        problem.key == ("data", "chat", "template")
        and "none of chatml, llama3, gemma, and as a file it cannot be read: No such file" in problem.message
    )
    file.write_text("no template")
    _, (problem,) = recipe(str(file))
    assert "the file holds no Jinja template" in problem.message
    file.write_bytes(b"\xff{{")
    _, (problem,) = recipe(str(file))
    assert "it cannot be read: not UTF-8" in problem.message


def test_a_chat_template_may_be_that_of_another_model_s_directory(tmp_path):
    def told(**files: str) -> str | None:
        for name, text in files.items():
            (tmp_path / name.replace("__", ".")).write_text(text)
        chat = {"chat": {"template": str(tmp_path)}}
        found, problems = check(Recipe, MINIMAL | {"data": {"train": "d", "template": "chat", **chat}})
        return found.data.chat.template if found else problems[0].message

    assert "it cannot be read: No such file" in told()
    assert "it cannot be read: not JSON" in told(tokenizer_config__json="{")
    assert "the directory holds no Jinja template" in told(tokenizer_config__json="[]")
    several = [{"name": "tool_use", "template": "{{ a }}"}, {"name": "default", "template": "{{ b }}"}]
    assert told(tokenizer_config__json=json.dumps({"chat_template": several})) == "{{ b }}"
    assert told(tokenizer_config__json=json.dumps({"chat_template": "{{ c }}"})) == "{{ c }}"
    assert told(chat_template__jinja="{{ d }}") == "{{ d }}"


def test_settings_of_conversations_are_refused_for_other_templates():
    data = {"train": "d", "template": "alpaca", "chat": {"system": "Hi."}, "turns": "last"}
    _, problems = check(Recipe, MINIMAL | {"data": data})
    assert [problem.key for problem in problems] == [("data", "chat"), ("data", "turns")]
    assert "data.turns is for data.template: chat" in problems[1].message


def test_micro_batches_without_a_number_are_small_on_a_cpu_and_as_large_as_fits_on_a_gpu():
    def rows(size, device):
        return TrainingConfig(micro_batch_size=size).rows_at_once(device)

    assert [rows(size, "cpu") for size in (None, "auto", 7)] == [4, None, 7]
    assert [rows(size, "cuda") for size in (None, "auto", 7)] == [None, None, 7]


def test_a_recipe_by_dotted_keys_is_the_one_that_it_came_from():
    recipe = Recipe.model_validate({**MINIMAL, "training": {"lr_multiplier": {"B": 4.0}}})
    assert Recipe.from_flat(recipe.flat()) == recipe
    few = {"name": "r", "model.path": "m", "data.train": "d.json", "training.lr_multiplier": {"B": 4.0}}
    assert Recipe.from_flat(few) == recipe
