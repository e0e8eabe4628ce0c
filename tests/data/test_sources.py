"""Finding sources, mapping columns, bad rows, and what the hub may answer."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from linchain_cli.data import hub
from linchain_cli.data.formats import FormattedRows
from linchain_cli.data.reading import hub_dataset
from linchain_cli.data.rows import RowError
from linchain_cli.data.sources import resolve_source
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.recipe import SourceConfig

GOOD = {"instruction": "q", "input": "", "output": "a", "answer": 3}


def rows_of(source, template="alpaca", tokenizer=None) -> FormattedRows:
    return FormattedRows(resolve_source(source), get_template(template, tokenizer).layouts)


def errors_of(source, template="alpaca") -> list[str]:
    """What is wrong with each row, with its place; "" for a row that can be used."""
    rows = rows_of(source, template)
    return [f"{rows.place()}: {row}" if isinstance(row, RowError) else "" for row in rows]


def test_only_the_template_s_columns_are_kept_in_order(write, source):
    path = write("x.json", json.dumps([{**GOOD, "source": "x"}, {"output": "b", "instruction": "r"}]))
    rows = rows_of(source(path))
    assert list(rows) == [
        {"instruction": "q", "output": "a", "input": ""},
        {"instruction": "r", "output": "b"},
    ]
    assert rows.unread == ["source"]


def test_columns_are_mapped(write, source):
    path = write("x.csv", "question,solution,output\nq,s,other\n")
    columns = {"instruction": "question", "output": "solution"}
    assert list(rows_of(source(path, columns=columns))) == [{"instruction": "q", "output": "s"}]


def test_a_mapping_of_what_the_template_does_not_use_is_refused(write, source):
    with pytest.raises(InputError, match="no column 'instrution'. Did you mean 'instruction'"):
        rows_of(source(write("x.json", json.dumps([GOOD])), columns={"instrution": "question"}))


@pytest.mark.parametrize(
    "bad, said",
    [
        (
            {"instruction": "q", "ouput": "a"},
            r"there is no column 'output' \(columns: instruction, ouput\). Did you mean "
            r"'ouput'\?.*\{output: ouput\}",
        ),
        ({}, r"there is no column 'instruction' \(columns: none\)"),
        ({**GOOD, "output": None}, "'output' is null"),
        ({**GOOD, "output": [3]}, r"'output' is \[3\] \(list\)"),
        ({**GOOD, "instruction": ["a"] * 50}, r"'instruction' is \['a', 'a'.*\.\.\. \(list\)"),
        ({**GOOD, "tools": [{"name": "f"}]}, "the row holds `tools`, .*data.template: chat"),
        (
            {"messages": []},
            "there is no column 'instruction' .*The rows hold conversations .*data.template: chat",
        ),
        ({"text": "x"}, r".*The rows hold documents \(`text`\): data.template: text takes them"),
    ],
)
def test_a_bad_row_is_named(write, source, bad, said):
    path = write("x.json", json.dumps([GOOD, bad, GOOD], indent=0))
    before, error, behind = errors_of(source(path))
    assert re.search(rf"x.json:\d+ \(row 2\): {said}", error)
    assert before == behind == ""


def test_null_is_empty_and_numbers_are_text(write, source):
    rows = [
        {**GOOD, "input": None, "output": 3},
        {**GOOD, "output": 2.50},
        {**GOOD, "output": True, "tools": None},
        {**GOOD, "output": "x", "tools": []},
    ]
    read = list(rows_of(source(write("x.json", json.dumps(rows)))))
    assert [row["output"] for row in read] == ["3", "2.5", "true", "x"]
    assert "input" not in read[0]


def test_a_missing_number_of_a_table_is_null(tmp_path, source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(
        pa.table({"instruction": ["a", "b"], "output": [1.5, float("nan")], "input": [None, 2]}), path
    )
    first, second = errors_of(source(path))
    assert first == "" and "'output' is null" in second
    assert next(iter(rows_of(source(path)))) == {"instruction": "a", "output": "1.5"}


@pytest.mark.parametrize("cells", [[0, 1, 1], ["0", "1", "1"], ["negative", 1, "positive"]])
def test_labels_name_the_answers(write, source, cells):
    rows = [{"text": f"row {cell}", "label": cell} for cell in cells]
    labels = {"0": "negative", "1": "positive"}
    asked = {"columns": {"instruction": "text", "output": "label"}, "labels": labels}
    path = write("x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert [row["output"] for row in rows_of(source(path, **asked))] == ["negative", "positive", "positive"]
    assert [row["instruction"] for row in rows_of(source(path, **asked))][1] == "row 1"
    own = {"prompt": "{text} ->", "response": " {label}"}
    assert next(iter(rows_of(source(path, labels=labels), own)))["label"] == "negative"
    path = write("y.jsonl", json.dumps({"text": "x", "label": 7}))
    assert "'label' is 7, which data.labels does not name (0, 1)" in errors_of(source(path, **asked))[0]


def test_classes_of_a_data_set_are_named(tmp_path, source):
    import datasets

    kinds = datasets.Features(text=datasets.Value("string"), label=datasets.ClassLabel(names=["no", "yes"]))
    datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=kinds).save_to_disk(tmp_path)
    columns = {"instruction": "text", "output": "label"}
    assert [row["output"] for row in rows_of(source(tmp_path, columns=columns))] == ["yes", "no"]
    numbers = rows_of(source(tmp_path, columns=columns, labels={"0": "A", "1": "B"}))
    assert [row["output"] for row in numbers] == ["B", "A"]


@pytest.mark.parametrize("form", [{"type": "numpy"}, {"type": "numpy", "columns": ["ids"]}])
def test_a_saved_data_set_is_read_as_it_is_stored_whatever_its_format(tmp_path, source, form):
    import datasets

    rows = {"instruction": ["a", "b"], "output": [1, 2], "ids": [[3], [4]]}
    datasets.Dataset.from_dict(rows).with_format(**form).save_to_disk(tmp_path)
    assert [row["output"] for row in rows_of(source(tmp_path))] == ["1", "2"]


def test_misspelt_headers_are_told_of_the_file(write, source, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pytest.raises(InputError, match=r"x.csv:1: there is no column 'output' .*Did you mean 'outputs'"):
        list(rows_of(source(write("x.csv", "instruction,outputs\na,b\n"))))
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"instruction": ["a"], "Output": ["b"]}), path)
    with pytest.raises(InputError, match=r"x.parquet: there is no column 'output' .*Did you mean 'Output'"):
        list(rows_of(source(path)))


def test_the_message_is_about_the_layout_that_comes_closest(write, source, byte_level):
    for columns, missing in [("instruction,ouput", "output"), ("mesages,id", "messages")]:
        with pytest.raises(InputError, match=f"there is no column '{missing}'"):
            list(rows_of(source(write("x.csv", f"{columns}\na,b\n")), "chat", byte_level))


def test_parquet_cells_are_checked_too(tmp_path, source):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"instruction": ["a", None, "c"], "output": ["x", "y", "z"]}), path)
    assert [error.partition(".parquet")[2] for error in errors_of(source(path))] == [
        "",
        " (row 2): 'instruction' is null, where a value is expected",
        "",
    ]


def test_registered_names_are_found_as_files_first(write, source, tmp_path, monkeypatch):
    write("commonsense_170k.json", json.dumps([GOOD]))
    found = resolve_source(source("commonsense170k"), tmp_path)
    assert (found.kind, found.location) == ("files", str(tmp_path / "commonsense_170k.json"))
    monkeypatch.setenv("LINCHAIN_DATA_DIR", str(tmp_path))
    assert resolve_source(source("commonsense170k")).kind == "files"
    monkeypatch.delenv("LINCHAIN_DATA_DIR")
    assert resolve_source(source("commonsense170k")).location == "zwhe99/commonsense_170k"
    monkeypatch.chdir(tmp_path)
    assert resolve_source(source("commonsense170k")).kind == "files"


def test_llm_adapters_keeps_training_files_beside_its_tests(tmp_path, source):
    (tmp_path / "dataset").mkdir()
    (tmp_path / "ft-training_set").mkdir()
    (tmp_path / "ft-training_set" / "math_10k.json").write_text("[]")
    assert resolve_source(source("math10k"), tmp_path / "dataset").kind == "files"
    with pytest.raises(InputError, match="needs the file math_10k.json"):
        resolve_source(source("math10k"))


def test_everyday_is_generated(source):
    rows = list(rows_of(source("everyday", split="train")))
    assert rows and set(rows[0]) == {"instruction", "input", "output"}
    with pytest.raises(InputError, match="no split 'validation'. Splits: train, test"):
        list(rows_of(source("everyday", split="validation")))


@pytest.mark.parametrize(
    "name, said",
    [
        ("commonsense170", "no file, hub id .* Did you mean 'commonsense170k'"),
        ("everday", "Did you mean 'everyday'"),
        ("trian.json", "there is no file trian.json below /.* Did you mean 'train.json'"),
        ("https://huggingface.co/datasets/org/set", "no data file. The data set of that page is org/set."),
        ("rows.txt", "rows.txt is a file; a data file ends in"),
        ("empty", r"the directory empty holds no data file \(it holds notes.txt\); one ends in"),
        ("a b/c", "no file, hub id"),
        ("empty/nots", "no file or directory empty/nots, and it looks like a path"),
        ("data/trian", "no file or directory data/trian, and it looks like a path"),
    ],
)
def test_what_cannot_be_found_gets_a_suggestion(write, source, tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    write("train.json", "[]")
    write("rows.txt", "")
    (tmp_path / "empty").mkdir()
    write("empty/notes.txt", "")
    with pytest.raises(InputError, match=said):
        resolve_source(source(name))


def hub_rows(monkeypatch, answer):
    """Puts a stand-in in the place of `datasets.load_dataset`: a data set to return, or an error to raise."""
    import datasets

    asked = []

    def load_dataset(path, name=None, *, split, revision):
        asked.append((path, name, split, revision))
        if isinstance(answer, BaseException):
            raise answer
        return answer

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub.load_hub_dataset.cache_clear()
    return asked


def test_hub_data_sets_with_split_revision_and_configuration(monkeypatch, source):
    import datasets

    data = datasets.Dataset.from_dict({"instruction": ["a", "b"], "output": ["x", "y"], "other": [1, 2]})
    asked = hub_rows(monkeypatch, data)
    rows = rows_of(source("owner/set/part", split="test[:2]", revision="abc"))
    assert list(rows) == [{"instruction": "a", "output": "x"}, {"instruction": "b", "output": "y"}]
    assert asked == [("owner/set", "part", "test[:2]", "abc")]
    list(rows_of(source("commonsense170k")))
    assert asked[-1] == ("zwhe99/commonsense_170k", None, "train", None)
    renamed = data.rename_column("output", "outputs")
    hub_rows(monkeypatch, renamed)
    with pytest.raises(InputError, match="owner/other: there is no column 'output' .*Did you mean 'outputs'"):
        list(rows_of(source("owner/other")))


def test_bad_rows_of_hub_data_sets_are_named(monkeypatch, source):
    import datasets

    hub_rows(monkeypatch, datasets.Dataset.from_dict({"instruction": ["a", None], "output": ["x", "y"]}))
    assert errors_of(source("owner/nulls"))[1].startswith(
        "owner/nulls (row 2, split train): 'instruction' is"
    )


def _refused(kind, status: int):
    """An error of huggingface_hub, which is made from a response."""
    return kind(str(status), response=SimpleNamespace(status_code=status, headers={}, request=None))


def _from(cause: BaseException, error: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def _hub_answers():
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub import errors

    gated = _refused(errors.GatedRepoError, 401)
    return {
        "gated": (
            _from(gated, DatasetNotFoundError("Dataset 'o/n' is a gated dataset on the Hub.")),
            "is gated.*hf auth login",
        ),
        "unknown": (
            _from(
                _refused(errors.RepositoryNotFoundError, 404),
                DatasetNotFoundError("Dataset 'o/n' doesn't exist on the Hub or cannot be accessed."),
            ),
            "no data set 'o/n' that you may see",
        ),
        "revision": (
            _from(
                _refused(errors.RevisionNotFoundError, 404),
                DatasetNotFoundError("Revision 'x' doesn't exist for dataset 'o/n' on the Hub."),
            ),
            "has no revision",
        ),
        "no network": (
            _from(errors.HTTPError("refused"), ConnectionError("Couldn't reach 'o/n' on the Hub")),
            "'o/n' is not on this machine",
        ),
        "busy": (_refused(errors.HfHubHTTPError, 503), "refused the data set 'o/n'.*later"),
        "offline": (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it"),
        "split": (
            ValueError("Unknown split \"train\". Should be one of ['training', 'test']."),
            "Did you mean 'training'",
        ),
        "configuration": (
            ValueError("Config name is missing.\nPlease pick one among the available configs: ['a', 'b']"),
            "o/n/CONFIGURATION",
        ),
        "script": (
            RuntimeError("Dataset scripts are no longer supported, but found n.py"),
            "refs/convert/parquet",
        ),
        "other": (KeyError("what?"), "cannot be loaded: KeyError"),
    }


@pytest.mark.parametrize("case", list(_hub_answers()))
def test_the_hub_s_refusals_say_what_to_do(monkeypatch, source, case):
    error, said = _hub_answers()[case]
    hub_rows(monkeypatch, error)
    with pytest.raises(InputError, match=said) as caught:
        list(rows_of(source("o/n")))
    assert "\n" not in str(caught.value)


def test_without_a_hub_the_real_library_s_failure_is_understood(source):
    hub.load_hub_dataset.cache_clear()
    with pytest.raises(
        InputError, match="'nobody/nothing' is not on this machine, and HF_HUB_OFFLINE is set"
    ):
        list(rows_of(source("nobody/nothing")))


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("commonsense170k", None, "commonsense_170k.json"),
        ("glue/rte", None, "RTE/train.tsv"),
        ("glue/mnli", "validation", "MNLI/dev_matched.tsv"),
    ],
)
def test_a_file_that_stands_in_for_the_hub_is_named(tmp_path, monkeypatch, name, split, file):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LINCHAIN_DATA_DIR", raising=False)
    found = resolve_source(SourceConfig(path=name, split=split))
    with pytest.raises(InputError, match=f"Or let LINCHAIN_DATA_DIR name a directory that holds {file}."):
        hub_dataset(found)


def test_a_hub_that_does_not_answer_is_told_once(monkeypatch, caplog):
    import logging

    import datasets

    from linchain_cli.data import hub

    def unreachable(*_arguments, **_options):
        for attempt in range(1, 6):
            logger.warning("'[Errno -2] Name or service not known' thrown while requesting HEAD https://...")
            logger.warning(f"Retrying in 1s [Retry {attempt}/5].")
        logger.warning("something else")
        raise ConnectionError("unreachable")

    logger = logging.getLogger("huggingface_hub.utils._http")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match="is not on this machine"):
        hub.load_hub_dataset("someone/never-asked-for", "train", None)
    assert [record.getMessage() for record in caplog.records] == [
        "The hub does not answer; it is asked again for half a minute.",
        "something else",
    ]
    assert not logger.filters


@pytest.mark.parametrize("name", ["data/rows", "datasets/mine/rows", "here/rows"])
def test_what_looks_like_a_path_is_never_asked_of_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(InputError, match=f"{name}, and it looks like a path"):
        resolve_source(SourceConfig(path=name))
    assert resolve_source(SourceConfig(path="owner/rows")).kind == "hub"
