"""Rows with a label: their columns, classes, tokens and batches."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.glue import TASKS, find_glue
from linchain_cli.data.labelled import Labelling, find_classes
from linchain_cli.data.labelled_batches import collate_labelled
from linchain_cli.data.rows import RowError
from linchain_cli.errors import InputError
from linchain_cli.recipe import DataConfig

WORDS = "the cat sat on a mat and saw no dog near it while rain fell".split()


@pytest.fixture(scope="module")
def bert_tokenizer(tmp_path_factory):
    """A WordPiece tokenizer as BERT's: [CLS] a [SEP] b [SEP], with segment ids."""
    from transformers import BertTokenizer

    vocabulary = tmp_path_factory.mktemp("bert") / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    return BertTokenizer(str(vocabulary))


@pytest.fixture(autouse=True)
def _places(tmp_path, monkeypatch):
    monkeypatch.setenv("LINCHAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def write(name: str, rows: list[dict]) -> str:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return name


def config(train, **others) -> DataConfig:
    return DataConfig.model_validate({"train": train, "validation": 0, "max_length": 16, **others})


PAIRS = [
    {"premise": "the cat sat", "hypothesis": "a cat", "label": "yes"},
    {"premise": "rain fell", "hypothesis": "no rain fell on it", "label": "no"},
    {"premise": "the dog", "hypothesis": "a dog", "label": "maybe"},
]


def test_a_pair_is_encoded_as_the_tokenizer_itself_does(bert_tokenizer):
    data = prepare_data(config(write("rows.jsonl", PAIRS)), bert_tokenizer, task="classification")
    batch = collate_labelled(data.train, [0, 1, 2], bert_tokenizer.pad_token_id)
    expected = bert_tokenizer(
        [row["premise"] for row in PAIRS],
        [row["hypothesis"] for row in PAIRS],
        padding=True,
        return_tensors="pt",
    )
    for name in ("input_ids", "attention_mask", "token_type_ids"):
        assert getattr(batch, name).equal(expected[name]), name
    assert data.template.classes == ("maybe", "no", "yes")  # by the alphabet
    assert batch.targets.tolist() == [2, 1, 0] and batch.counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_is_cut_where_the_tokenizer_cuts(bert_tokenizer, side):
    tokenizer = copy.deepcopy(bert_tokenizer)
    tokenizer.truncation_side = side
    section = config(write("rows.jsonl", PAIRS), max_length=7)
    data = prepare_data(section, tokenizer, task="classification")
    texts = [[row[name] for row in PAIRS] for name in ("premise", "hypothesis")]
    expected = tokenizer(*texts, truncation=True, max_length=7)["input_ids"]
    assert [data.train[number][0].tolist() for number in range(3)] == expected
    (told,) = (warning for warning in data.report.warnings if "max_length" in warning)
    assert told.endswith(f"loses its {'beginning' if side == 'left' else 'end'}")


def test_every_row_counts_one_supervised_place(bert_tokenizer):
    data = prepare_data(config(write("rows.jsonl", PAIRS)), bert_tokenizer, task="classification")
    assert data.train.supervised_counts.tolist() == [1, 1, 1]
    assert data.report.supervised_tokens == 3


def test_of_a_row_that_is_too_long_the_longer_text_is_cut(bert_tokenizer):
    rows = [{"text": "cat " * 20, "text_pair": "dog", "label": number} for number in (0, 1)]
    data = prepare_data(config(write("rows.jsonl", rows)), bert_tokenizer, task="classification")
    text = bert_tokenizer.decode(data.train[0][0])
    assert text == "[CLS] " + "cat " * 12 + "[SEP] dog [SEP]" and len(data.train[0][0]) == 16
    assert "longer of their texts" in " ".join(data.report.warnings) and data.report.longest == 24


def test_a_length_without_room_beside_special_tokens_is_told(bert_tokenizer):
    rows = write("rows.jsonl", PAIRS)
    with pytest.raises(InputError, match="data.max_length: 2 leaves no room"):
        prepare_data(config(rows, max_length=2), bert_tokenizer, task="classification")


def test_without_a_separator_a_line_break_stands_between_two_texts(tiny_tokenizer_dir):
    from linchain_cli.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    data = prepare_data(config(write("rows.jsonl", PAIRS), max_length=64), tokenizer, task="classification")
    assert tokenizer.decode(data.train[0][0]) == "the cat sat\na cat"
    assert collate_labelled(data.train, [0], 0).token_type_ids is None


def test_classes_are_found_in_the_rows_and_numbers_go_by_their_size():
    found = find_classes(config(write("rows.jsonl", [{"text": "a", "label": n} for n in (10, 9, 2.0, 2)])))
    assert found == ("2", "9", "10")


def test_white_space_around_a_label_makes_no_class_and_no_label_neither(bert_tokenizer):
    rows = [{"text": "a", "label": label} for label in ("good", " good\n", "Good", "bad", "")]
    wanted = config(write("rows.jsonl", rows))
    assert find_classes(wanted) == ("Good", "bad", "good")
    with pytest.raises(InputError, match=r"rows.jsonl:5 \(row 5\): the label is empty"):
        prepare_data(wanted, bert_tokenizer, task="classification")
    data = prepare_data(
        wanted.model_copy(update={"on_bad_row": "skip"}), bert_tokenizer, task="classification"
    )
    assert data.train.targets.tolist() == [2, 2, 0, 1]
    assert "Good, good are classes of their own, though they differ by case alone" in data.report.warnings


def test_words_for_labels_are_the_classes_in_their_order(bert_tokenizer):
    rows = [{"text": "cat", "label": 0}, {"text": "dog", "label": 1}, {"text": "mat", "label": "low"}]
    wanted = config(write("rows.jsonl", rows), labels={"1": "high", "0": "low"})
    data = prepare_data(wanted, bert_tokenizer, task="classification")
    assert data.template.classes == ("high", "low") and data.train.targets.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("values", "words"),
    [((False, True), ("false", "true")), ((0.0, 1.0), ("0", "1")), ((" 0", "1 "), ("0", "1"))],
)
def test_words_are_found_for_labels_however_they_are_stored(bert_tokenizer, values, words):
    """A column with missing values holds fractions where pandas has written it."""
    rows = [{"text": "cat", "label": values[0]}, {"text": "dog", "label": values[1]}]
    wanted = config(write("rows.jsonl", rows), labels=dict(zip(words, ("low", "high"), strict=True)))
    data = prepare_data(wanted, bert_tokenizer, task="classification")
    assert data.template.classes == ("low", "high") and data.train.targets.tolist() == [0, 1]


def test_classes_that_a_data_set_names_keep_its_order(bert_tokenizer):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    )
    rows = {"text": ["cat", "dog", "mat"], "label": [1, 0, 1]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk("saved")
    data = prepare_data(config("saved"), bert_tokenizer, task="classification")
    assert data.template.classes == ("zebra", "ant") and data.train.targets.tolist() == [1, 0, 1]


def test_a_regression_takes_numbers(bert_tokenizer):
    rows = [{"text": "cat", "label": 2.5}, {"text": "dog", "label": "-1e-2"}]
    data = prepare_data(config(write("rows.jsonl", rows)), bert_tokenizer, task="regression")
    np.testing.assert_allclose(data.train.targets, [2.5, -0.01], rtol=1e-6)
    with pytest.raises(RowError, match="'warm' is no number"):
        data.template.target("warm")


def test_columns_of_the_usual_names_are_found_told_and_settled(bert_tokenizer):
    data = prepare_data(config(write("rows.jsonl", PAIRS)), bert_tokenizer, task="classification")
    chosen = {"text": "premise", "text_pair": "hypothesis", "label": "label"}
    assert data.config.train[0].columns == chosen
    assert "{text: premise, text_pair: hypothesis, label: label}" in " ".join(data.report.notes)


def test_columns_are_found_in_whatever_case(bert_tokenizer):
    rows = [{"Text": "cat", "Sentiment": "good"}, {"Text": "dog", "Sentiment": "bad"}]
    data = prepare_data(config(write("rows.jsonl", rows)), bert_tokenizer, task="classification")
    assert data.config.train[0].columns == {"text": "Text", "label": "Sentiment"}
    both = [{**row, "text": "mat", "label": number} for number, row in enumerate(rows)]
    data = prepare_data(config(write("both.jsonl", both)), bert_tokenizer, task="classification")
    assert data.config.train[0].columns == {"text": "text", "label": "label"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "all labels are 1: there is nothing"),
        ([{"text": "a", "label": n / 7} for n in range(120)], "120 values in 120 rows.*task: regression"),
        ([{"text": "a", "label": n} for n in range(1200)], "more than 1,000 values in 1,001 rows"),
        ([{"text": "a", "lable": "x"}, {"text": "a", "lable": "y"}], "no column 'label'.*lable"),
        ([{"text": "a", "label": "x"}, {"text": "a", "label": None}], "row 2.*'label' is null"),
        ([{"text": "a", "label": ["x", "y"]}], r"row 1\): 'label' is .*multi-label"),
    ],
)
def test_labels_that_are_no_classes_are_refused(bert_tokenizer, rows, message):
    with pytest.raises(InputError, match=message):
        prepare_data(config(write("rows.jsonl", rows)), bert_tokenizer, task="classification")


def test_a_validation_row_of_an_unknown_class_is_named(bert_tokenizer):
    train = write("train.jsonl", PAIRS)
    other = write("other.jsonl", [{**PAIRS[0], "label": "yess"}])
    with pytest.raises(InputError, match=r"other.jsonl:1 .*'yess' is none of the classes, such as 'yes'"):
        prepare_data(config(train, validation=other), bert_tokenizer, task="classification")


def test_a_label_in_another_case_is_the_class_that_has_it(bert_tokenizer):
    """true of .json is True where Python has written a .csv."""
    rows = [{"text": "cat", "label": True}, {"text": "dog", "label": False}]
    Path("other.csv").write_text("text,label\ncat,True\n")
    wanted = config(write("rows.jsonl", rows), validation="other.csv")
    assert prepare_data(wanted, bert_tokenizer, task="classification").validation.targets.tolist() == [1]
    both = Labelling("classification", ("Good", "good"))
    with pytest.raises(RowError, match="'GOOD' is none of the classes"):
        both.target("GOOD")
    assert (both.target("Good"), both.target("good")) == (0, 1)


def test_a_class_that_only_validation_rows_have_is_named_in_data_labels(bert_tokenizer):
    train = write("train.jsonl", PAIRS)
    other = write("other.jsonl", [{**PAIRS[0], "label": "never"}])
    with pytest.raises(InputError, match="'never' is none of the classes.*unless data.labels names them all"):
        prepare_data(config(train, validation=other), bert_tokenizer, task="classification")
    names = {name: name for name in ("yes", "no", "maybe", "never")}
    wanted = config(train, validation=other, labels=names)
    data = prepare_data(wanted, bert_tokenizer, task="classification")
    assert data.validation.targets.tolist() == [3] and data.template.classes == tuple(names)


def test_a_text_of_no_token_is_a_bad_row(tiny_tokenizer_dir):
    """As empty ones are with a tokenizer that puts nothing around a text."""
    from linchain_cli.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(tiny_tokenizer_dir)
    rows = [{"text": text, "label": label} for text, label in (("cat", 0), ("", 1), ("dog", 1))]
    wanted = config(write("rows.jsonl", rows))
    with pytest.raises(InputError, match=r"rows.jsonl:2 \(row 2\): its text is empty.*on_bad_row: skip"):
        prepare_data(wanted, tokenizer, task="classification")
    skipping = wanted.model_copy(update={"on_bad_row": "skip"})
    data = prepare_data(skipping, tokenizer, task="classification")
    assert data.train.targets.tolist() == [0, 1] and data.report.sources[0].bad == 1
    assert data.report.bad_examples == [
        "rows.jsonl:2 (row 2): its text is empty: the model has no token to read"
    ]


def test_control_tokens_in_a_text_are_counted(bert_tokenizer):
    texts = ["the cat", "the [SEP] cat", "[sep] [x] cat", "cat [MASK]"]
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(texts)]
    data = prepare_data(config(write("rows.jsonl", rows)), bert_tokenizer, task="classification")
    assert (data.train[1][0] == bert_tokenizer.sep_token_id).sum() == 2  # as transformers' tokenizer has it
    assert data.report.control_rows == 2
    assert data.report.control_examples == ["rows.jsonl:2 (row 2): [SEP]", "rows.jsonl:4 (row 4): [MASK]"]
    (told,) = (line for line in data.report.warnings if "control tokens" in line)
    assert told.startswith("2 of 4 rows hold control tokens") and "rows.jsonl:2 (row 2): [SEP]" in told


def test_a_tokenizer_that_splits_control_tokens_does_so_here(bert_tokenizer, monkeypatch):
    """`split_special_tokens` of its tokenizer_config.json."""
    rows = [{"text": "the [SEP] cat", "label": number} for number in (0, 1)]
    path = write("rows.jsonl", rows)
    whole = prepare_data(config(path), bert_tokenizer, task="classification").report
    monkeypatch.setattr(bert_tokenizer, "split_special_tokens", True)
    data = prepare_data(config(path), bert_tokenizer, task="classification")
    assert data.train[0][0].tolist() == bert_tokenizer("the [SEP] cat").input_ids
    assert (data.train[0][0] == bert_tokenizer.sep_token_id).sum() == 1
    assert not data.report.control_rows and data.report.fingerprint != whole.fingerprint


def test_encodings_of_other_classes_are_other_encodings(bert_tokenizer):
    rows = [{"text": "cat", "label": 0}, {"text": "dog", "label": 1}]
    path = write("rows.jsonl", rows)
    found = [
        prepare_data(config(path, labels=labels), bert_tokenizer, task="classification").report.fingerprint
        for labels in ({"0": "a", "1": "b"}, {"1": "b", "0": "a"})
    ]
    assert len(set(found)) == 2


def glue_files(directory: str, train: str, dev: str, dev_name: str = "dev.tsv") -> Path:
    place = Path("files/glue") / directory
    place.mkdir(parents=True)
    (place / "train.tsv").write_text(train)
    (place / dev_name).write_text(dev)
    return place


COLA = 'gj04\t1\t\tthe cat sat\ngj04\t0\t*\tcat the "sat\n'
RTE = "index\tsentence1\tsentence2\tlabel\n0\tthe cat\ta cat\tnot_entailment\n1\train\tdog\tentailment\n"


@pytest.mark.parametrize("path", ["glue/cola", "glue/CoLA", "files/glue/CoLA", "files/glue/CoLA/train.tsv"])
def test_cola_has_no_header_line(bert_tokenizer, monkeypatch, path):
    glue_files("CoLA", COLA, COLA)
    monkeypatch.setenv("LINCHAIN_DATA_DIR", "files")
    data = prepare_data(config(path), bert_tokenizer, task="classification")
    assert data.template.classes == ("unacceptable", "acceptable")
    assert data.train.targets.tolist() == [1, 0] and len(data.train) == 2


def test_names_as_distributed_are_the_numbers_of_the_hub(bert_tokenizer, monkeypatch):
    glue_files("RTE", RTE, RTE.replace("rain", "the rain"))
    monkeypatch.setenv("LINCHAIN_DATA_DIR", "files/glue")
    wanted = config("glue/rte", validation="glue/rte")
    data = prepare_data(wanted, bert_tokenizer, task="classification")
    assert data.train.targets.tolist() == [1, 0]
    assert bert_tokenizer.decode(data.validation[1][0]) == "[CLS] the rain [SEP] dog [SEP]"


def test_the_validation_split_of_mnli_is_the_matched_one(monkeypatch):
    header = "sentence1\tsentence2\tgold_label\n"
    glue_files("MNLI", header + "a\tb\tneutral\n", header + "c\td\tneutral\n", "dev_matched.tsv")
    monkeypatch.setenv("LINCHAIN_DATA_DIR", "files")
    from linchain_cli.data.sources import resolve_source
    from linchain_cli.recipe import SourceConfig

    local = resolve_source(SourceConfig(path="glue/mnli", split="validation"))
    assert [file.path.name for file in local.files.splits["validation"]] == ["dev_matched.tsv"]
    monkeypatch.delenv("LINCHAIN_DATA_DIR")
    on_hub = resolve_source(SourceConfig(path="glue/mnli", split="validation"))
    assert (on_hub.location, on_hub.config, on_hub.split) == ("nyu-mll/glue", "mnli", "validation_matched")


def test_a_task_that_glue_does_not_have_is_told_with_the_nearest(bert_tokenizer):
    with pytest.raises(InputError, match="no task 'glue/rtee'.*mean 'glue/rte'"):
        find_glue("glue/rtee", [])
    with pytest.raises(InputError, match="glue/stsb is a regression"):
        prepare_data(config("glue/stsb"), bert_tokenizer, task="classification", classes=("a", "b"))


def test_every_task_of_glue_maps_a_text_and_a_label():
    assert len(TASKS) == 8
    for task in TASKS.values():
        assert {"text", "label"} <= task.columns.keys() == task.local_columns.keys()


def test_a_labelling_is_told_from_another_by_all_that_changes_rows():
    one = Labelling("classification", ("a", "b"))
    others = [
        Labelling("classification", ("b", "a")),
        Labelling("classification", ("a", "b"), paired=False),
        Labelling("classification", ("a", "b"), segments=True),
        Labelling("classification", ("a", "b"), splits=True),
        Labelling("classification", ("a", "b"), keeps_end=True),
    ]
    assert len({one.fingerprint, *(other.fingerprint for other in others)}) == 6
