"""Recipes as people write them: what is accepted, and the message for everything else."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from linchain_cli.errors import InputError
from linchain_cli.recipe import Recipe, SourceConfig, TemplateConfig, load_recipe, strict_yaml
from linchain_cli.recipe.validation import check

VALID = """\
name: my-run
output_dir: runs
model:
  path: some/model
  dtype: auto
adapter:
  rank: 8
  depth: 3
  init: kaiming
  target_modules: [q_proj, v_proj]
data:
  train: [a.json, {path: b.json, split: dev}]
  validation: 12
  template: {prompt: "{instruction}\\n", response: "{output}"}
training:
  epochs: 2
  learning_rate: 1e-5
  lr_multiplier: {B: 4}
evaluation:
  tasks: [boolq]
"""
MINIMAL = "name: r\nmodel: {path: m}\ndata: {train: d.json}\n"


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str | bytes, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_values_are_read_by_their_declared_type(write):
    recipe = load_recipe(write(VALID))
    assert recipe.training.learning_rate == 1e-5
    assert recipe.adapter.alpha == 32.0 and recipe.adapter.rank == 8
    assert recipe.training.lr_multiplier.B == 4.0 and recipe.training.lr_multiplier.links == 1.0
    assert recipe.data.train == [SourceConfig(path="a.json"), SourceConfig(path="b.json", split="dev")]
    assert recipe.data.template == TemplateConfig(prompt="{instruction}\n")


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("0123456", "0123456"),
        ("1e10", "1e10"),
        ("no", "no"),
        ("2024-11-01", "2024-11-01"),
        ("null", None),
        ("'null'", "null"),
    ],
)
def test_a_revision_stays_the_text_that_was_written(write, line, value):
    text = MINIMAL.replace("{path: m}", f"{{path: m, revision: {line}}}")
    assert load_recipe(write(text)).model.revision == value


@pytest.mark.parametrize(("word", "value"), [("yes", True), ("On", True), ("FALSE", False), ("off", False)])
def test_booleans_in_all_of_yamls_spellings(write, word, value):
    assert load_recipe(write(MINIMAL), [f"training.compile={word}"]).training.compile is value


def test_validation_is_a_number_of_rows_or_a_file(write):
    path = write(MINIMAL)
    assert load_recipe(path).data.validation == "auto"
    assert load_recipe(path, ["data.validation=auto"]).data.validation == "auto"
    assert load_recipe(path, ["data.validation=7"]).data.validation == 7
    assert load_recipe(path, ["data.validation=dev.json"]).data.validation == "dev.json"
    assert "data.validation: expected a number of rows" in message(path, "data.validation=-7")
    assert load_recipe(path, ["data.validation=5%"]).data.validation == "5%"
    assert load_recipe(path, ["data.validation=0%", "training.keep=last"]).data.validation == 0
    for wrong in ("100%", "-5%", "x%", "{pth: dev.json}", "{path: dev.json, split: [a]}"):
        assert "data.validation" in message(path, f"data.validation={wrong}")


def test_a_validation_source_inherits_what_it_leaves_out(write):
    path = write(MINIMAL.replace("train: d.json", "train: d.json, revision: r1, columns: {output: a}"))
    assert load_recipe(path).data.validation_sources == []
    assert load_recipe(path, ["data.validation=5%"]).data.validation_sources == []
    (source,) = load_recipe(path, ["data.validation=d.json"]).data.validation_sources
    assert (source.split, source.revision, source.columns) == ("validation", "r1", {"output": "a"})
    own = "data.validation={path: e.json, split: 'dev[:5]', columns: {}, template: plain}"
    (source,) = load_recipe(path, [own]).data.validation_sources
    assert (source.split, source.revision, source.columns, source.template) == ("dev[:5]", None, {}, "plain")
    several = load_recipe(path, ["data.validation=[d.json, {path: e.json, split: test}]"])
    assert [(one.path, one.split, one.revision) for one in several.data.validation_sources] == [
        ("d.json", "validation", "r1"),
        ("e.json", "test", None),
    ]
    again, problems = check(Recipe, strict_yaml.parse(several.to_yaml()).value)
    assert again == several and not problems
    assert "sources of its own, got []" in message(path, "data.validation=[]")
    assert "data.validation[1].pth: unknown key" in message(path, "data.validation=[d.json, {pth: e.json}]")
    assert "weight" in message(path, "data.validation=[d.json, {path: e.json, weight: 2}]")


def test_sources_inherit_what_they_leave_out(write):
    train = "[a, {path: b, split: dev, columns: {}}]"
    text = f"name: r\nmodel: {{path: m}}\ndata: {{train: {train}, revision: r1, columns: {{input: x}}}}"
    first, second = load_recipe(write(text)).data.sources
    assert first == SourceConfig(path="a", revision="r1", columns={"input": "x"}, labels={}, template="auto")
    assert second == SourceConfig(
        path="b", split="dev", revision="r1", columns={}, labels={}, template="auto"
    )


def test_empty_sections_are_defaults(write):
    recipe = load_recipe(write(MINIMAL + "adapter:\ntraining:\n# epochs: 3\nevaluation:\n"))
    assert recipe.adapter.depth == 3 and recipe.training.epochs == 3


def test_every_problem_is_reported_at_once_with_line_key_and_remedy(write):
    path = write(
        "name: a/b\n"
        "modle: {path: m}\n"
        "adapter:\n"
        "  rnk: 8\n"
        "  init: ortogonal\n"
        "  dropout: 1\n"
        "  target_modules: [q_proj, {x: y}]\n"
        "data:\n"
        "  train: d.json\n"
        "  template: {promt: x}\n"
        "training:\n"
        "  epochs: 3\n"
        "  max_steps: 3\n"
        "  warmup_steps: soon\n"
        "learning_rate: 3\n"
        "training.max_steps: 3\n"
    )
    lines = message(path).splitlines()
    expected = [
        (1, "name", "expected a directory name of letters"),
        (2, "modle", "unknown key. Did you mean 'model'?"),
        (4, "adapter.rnk", "unknown key. Did you mean 'rank'?"),
        (
            5,
            "adapter.init",
            "expected one of orthogonal, identity, kaiming, got 'ortogonal'. Did you mean 'orthogonal'?",
        ),
        (6, "adapter.dropout", "expected a number of at least 0 and below 1, got '1'."),
        (
            7,
            "adapter.target_modules[1]",
            "expected a list of module names, a regular expression, or all-linear",
        ),
        (10, "data.template.promt", "unknown key. Did you mean 'prompt'?"),
        (12, "training.epochs", "give epochs or max_steps, not both."),
        (
            14,
            "training.warmup_steps",
            "expected a whole number of at least 0, or a share of the run below 1, got 'soon'.",
        ),
        (15, "learning_rate", "unknown key. Did you mean 'training.learning_rate'?"),
        (16, "training.max_steps", "unknown key. Write max_steps within training, as a key of its own."),
    ]
    assert lines[0] == f"{path} has {len(expected)} problems:"
    assert len(lines) == len(expected) + 1
    for line, (number, key, text) in zip(lines[1:], expected, strict=True):
        assert line.startswith(f"  {path}:{number}: {key}: {text}")


def test_keys_of_other_tools_are_told_by_our_names(write):
    path = write(
        "base_model: m\n"
        "lora_r: 8\n"
        "val_set_size: 0.05\n"
        "gradient_accumulation_steps: 4\n"
        "sample_packing: true\n"
        "template: alpaca\n"
        "data: {dataset: d.json, cutoff_len: 512, validation: {path: v.json, type: alpaca, ds_type: json}}\n"
        "training: {num_train_epochs: 3, eval_steps: 50, save_steps: 50, warmup_ratio: 0.1}\n"
    )
    first, *lines = message(path).splitlines()
    assert [line.partition(": unknown key")[2] for line in lines] == [
        "",
        ". Did you mean 'model.path'?",
        ". Did you mean 'adapter.rank'?",
        ". Did you mean 'data.validation'?",
        "; training.global_batch_size counts the rows of a step, over all processes and micro-batches.",
        "; leave it out: rows of like length are read together.",
        ". Did you mean 'data.template'?",
        ". Did you mean 'template'?",
        "; leave it out: a file's ending tells how it is read.",
        ". Did you mean 'train'?",
        ". Did you mean 'max_length'?",
        ". Did you mean 'epochs'?",
        ". Did you mean 'eval_every'?",
        ". Did you mean 'save_every'?",
        ". Did you mean 'warmup_steps'?",
    ]
    assert lines[0].startswith(f"  {path}: name: missing.")


def test_a_script_is_no_recipe(tmp_path):
    for name in ("train.py", "train.sh", "train.ipynb"):
        (tmp_path / name).write_text("trainer.train()\n")
        assert f"{name}: a script; a recipe is a short YAML file. Start from" in message(tmp_path / name)


def test_one_problem_is_one_line(write):
    path = write(VALID.replace("rank: 8", "rank: 0"))
    assert message(path) == f"{path}:7: adapter.rank: expected a whole number from 1 to 65,536, got '0'."


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("adapter.depth=-1", "adapter.depth: expected a whole number from 0 to 1,000, got '-1'."),
        ("adapter.rank=3.5", "adapter.rank: expected a whole number"),
        ("adapter.dropout=.nan", "adapter.dropout: expected a number"),
        ("adapter.alpha=inf", "adapter.alpha: expected a number above 0"),
        ("training.lr=1", "training.lr: unknown key. Did you mean 'learning_rate'?"),
        ("training.learning_rate=0", "a number above 0 and up to 1, or auto, got '0'"),
        ("training.optimizer=adam", "Did you mean 'adamw'?"),
        ("training.optimizer=adamw_torch", "expected adamw, got 'adamw_torch'. Did you mean 'adamw'?"),
        ("training.trackers=wandb", "swanlab, trackio, got 'wandb'. Write [wandb]."),
        (
            "data.template.prompt=Q: {question}",
            "expected non-empty text, got {'Q': {'question': None}}. Quote it",
        ),
        ("data.validation=0.1", "a share such as 5%, auto, or sources of its own, got '0.1'."),
        ("training.micro_batch_size=many", "expected a whole number of at least 1, auto or null, got 'many'"),
        ("training.trackers=[tensorbord]", "Did you mean 'tensorboard'?"),
        ("training=3", "training: expected a mapping"),
        ("training.eval_every=0.5", "a whole number of steps, epoch, or epoch/4 for four times an epoch"),
        ("training.save_every=epoch/0", "epoch/4 for four times an epoch, got 'epoch/0'"),
        ("adapter.target_modules=[]", "adapter.target_modules: expected"),
        (
            "adapter.target_modules='(q_proj'",
            "adapter.target_modules: expected a list of module names, a regular",
        ),
        ("data.template=alpacca", "Did you mean 'alpaca'?"),
        ("data.train=[]", "data.train: expected a registered name"),
        ("data.train=null", "data.train"),
        ('model.path="a\\0b"', "model.path: expected a hub id"),
        ("name=..", "name: expected a directory name"),
        ("model.path.x=1", "model.path.x cannot be set"),
        ("adapter.depth", "expected key=value, such as adapter.depth=VALUE."),
        ("adapter.dept", "expected key=value, such as adapter.depth=1. Did you mean 'adapter.depth'?"),
        ("=1", "expected key=value"),
        ("adapter.target_modules=*q_proj", "aliases such as *q_proj are not allowed"),
        ("adapter.target_modules=[qkv]_proj", "not YAML"),
    ],
)
def test_a_wrong_override_is_quoted(write, override, text):
    found = message(write(VALID), override)
    assert found.startswith(f"override '{override}': "), found
    assert text in found


def test_overrides_replace_values_of_the_file_and_the_last_one_wins(write):
    recipe = load_recipe(
        write(VALID), ["adapter.depth=1", "adapter.depth=0", "adapter.target_modules=all-linear"]
    )
    assert recipe.adapter.depth == 0 and recipe.adapter.target_modules == "all-linear"


def test_an_override_mends_what_is_wrong_in_the_file(write):
    assert load_recipe(write(VALID.replace("rank: 8", "rank: x")), ["adapter.rank=4"]).adapter.rank == 4


def test_steps_and_epochs_exclude_each_other_and_an_override_of_one_drops_the_other(write):
    path = write(VALID)
    assert load_recipe(path, ["training.max_steps=5"]).training.epochs is None
    steps = write(VALID.replace("epochs: 2", "max_steps: 5"), "steps.yaml")
    recipe = load_recipe(steps, ["training.epochs=0.5"])
    assert recipe.training.epochs == 0.5 and recipe.training.max_steps is None
    assert "not both" in message(path, "training.max_steps=5", "training={epochs: 1, max_steps: 2}")
    assert "left open" in message(path, "training.epochs=null")


def test_fields_that_do_not_go_together(write):
    path = write(MINIMAL)
    found = message(path, "data.validation=0", "training.early_stopping=2", "training.keep=best")
    assert "training.keep: 'best' is by validation loss" in found
    assert "training.early_stopping: early stopping is by validation loss" in found
    assert load_recipe(path, ["data.validation=0", "training.keep=last"]).data.validation == 0
    assert "bfloat16" in message(path, "model.attention=flash_attention_2", "model.dtype=float32")


def test_what_is_offloaded_has_to_be_there(write):
    found = message(write(MINIMAL), "training.offload_base=true", "training.offload_activations=true")
    assert "set parallel to shard or hybrid" in found and "set gradient_checkpointing to true" in found
    assert load_recipe(
        write(MINIMAL), ["training.offload_base=true", "training.parallel=hybrid"]
    ).training.offload_base


def test_a_wrong_value_hides_no_conflict_elsewhere_and_makes_none_up(write):
    found = message(write(MINIMAL), "data.validation=0", "training.keep=best", "adapter.rank=x")
    assert "'best' is by validation loss" in found and "adapter.rank" in found
    assert "left open" not in message(write(MINIMAL), "training.epochs=x")


def test_what_is_missing_is_named_with_what_belongs_there(write):
    lines = message(write("adapter: {rank: 2}\n")).splitlines()
    assert [line.split(": ")[1] for line in lines[1:]] == ["name", "model.path", "data.train"]
    assert "missing. Expected a hub id, a local directory or a .gguf file." in lines[2]


def test_structure_that_yaml_allows_and_recipes_do_not(write):
    text = VALID.replace("rank: 8", "rank: 8\n  rank: 9").replace(
        "dtype: auto", "dtype: &d auto\n  revision: *d"
    )
    found = message(write(text))
    assert ":5: anchors such as &d" in found and ":6: model.revision: aliases such as *d" in found
    assert ":9: adapter.rank: given twice; first in line 8" in found
    assert "tags such as !!python/name:os.system" in message(
        write(MINIMAL.replace("{path: m}", "{path: !!python/name:os.system m}"))
    )
    assert "<<: unknown key" in message(write(MINIMAL + "<<: {seed: 1}\n"))
    assert ":4: a key must be a word" in message(write(MINIMAL + "[a, b]: 1\n"))


@pytest.mark.parametrize(
    "wrong", ["evaluation: *t", "data: {train: *t}", "training:\n  epochs: *t", "<<: *t", "*t : 1"]
)
def test_an_alias_is_one_problem(write, wrong):
    text = (
        MINIMAL.replace("data: {train: d.json}", wrong) if wrong.startswith("data") else f"{MINIMAL}{wrong}\n"
    )
    found = message(write(text))
    assert "aliases such as *t are not allowed" in found and "problems" not in found, found


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("", "the file is empty"),
        ("# nothing\n---\n", "the file is empty"),
        ("just words", "a recipe is a mapping"),
        ("- a\n- b\n", "a recipe is a mapping"),
        ("name: r\n\tmodel: m\n", ":2: not YAML"),
        ("name: r\nmodel: {path: m\n", "not YAML"),
        ("name: r: s\n", ":1: not YAML: a ':' where no key can stand"),
        ("name: r\n---\nname: s\n", ":2: not YAML: a second document starts here"),
        ("a: " + "[" * 5000, "nested too deeply"),
        (b"\x93NUMPY\x01\x00v\x00{", "not UTF-8 text"),
        (b"name: r\nmodel: \xff\n", ":2: not UTF-8 text"),
        (b"PK\x03\x04\x00\x00", "a binary file"),
        (b"name: \x07\n", ":1: not YAML: holds a character"),
        (b"#" * ((1 << 20) + 1), "a recipe is a short YAML file"),
    ],
)
def test_files_that_are_no_recipes(write, content, text):
    path = write(content)
    found = message(path)
    assert found.startswith(str(path)) and text in found
    assert "\n" not in found


def test_a_byte_order_mark_and_windows_line_ends_are_read(write):
    assert load_recipe(write(b"\xef\xbb\xbf" + VALID.replace("\n", "\r\n").encode())) == load_recipe(
        write(VALID, "b.yaml")
    )


def test_paths_that_are_no_files(write, tmp_path):
    write(VALID, "figure.yaml")
    assert f"Did you mean '{tmp_path / 'figure.yaml'}'?" in message(tmp_path / "figur.yaml")
    elsewhere = tmp_path / "empty"
    elsewhere.mkdir()
    assert "linchain recipes copy llama3-8b-commonsense" in message(elsewhere / "lama3-8b-commonsense.yaml")
    assert "linchain recipes list" in message(elsewhere / "zzz.yaml")
    assert "a recipe is a YAML file" in message(elsewhere)
    write(VALID, "recipe.yaml")
    assert f"Its recipe is {tmp_path / 'recipe.yaml'}" in message(tmp_path)
    assert "cannot be read" in message(Path("a\0b.yaml"))
    assert "no such file" in message(tmp_path / "no" / "such" / "directory.yaml")


@pytest.mark.parametrize("key", ["<<", "<list>", "''", "1", "a.b", "'[0]'"])
def test_odd_keys_are_unknown_keys(write, key):
    for text in (f"{MINIMAL}{key}: 1\n", f"{MINIMAL}training: {{{key}: 1}}\n"):
        assert ":4: " in message(write(text)) and "unknown key" in message(write(text))


def test_a_file_with_thousands_of_wrong_keys_is_told_in_fifty_lines(write):
    path = write(MINIMAL + "".join(f"key{i}: {i}\n" for i in range(20_000)))
    started = time.process_time()
    lines = message(path).splitlines()
    assert time.process_time() - started < 20  # the parser's; each key was looked up before, for two minutes
    assert len(lines) == 51 and lines[0] == f"{path} has 51 problems, of which these are the first 50:"
    assert lines[1].endswith("more is wrong than the first 50 problems.")
    assert lines[2].startswith(f"  {path}:4: key0: unknown key.")
    doubled = write(MINIMAL + "seed: 1\n" * 1000, "doubled.yaml")
    lines = message(doubled).splitlines()
    assert len(lines) == 51 and "of which these are the first 50:" in lines[0]


def test_a_pipe_is_no_recipe(tmp_path):
    os.mkfifo(tmp_path / "recipe.yaml")
    assert "not a regular file" in message(tmp_path / "recipe.yaml")


@pytest.mark.parametrize(
    "override",
    [
        *("adapter.rank=99999999999", "adapter.depth=100000000", "data.max_length=99999999999999999999"),
        *("training.global_batch_size=99999999999999999999", "training.max_steps=99999999999999999999"),
        *("training.epochs=1e300", "seed=99999999999999999999"),
    ],
)
def test_numbers_that_nothing_could_count_are_refused_with_the_bound(write, override):
    said = message(write(MINIMAL), override)
    assert " to " in said or "below" in said or "at most" in said
