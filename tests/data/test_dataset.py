"""From a data section to encoded rows: held-out rows, lengths, and rows with nothing to learn."""

from __future__ import annotations

import copy
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest

from linchain_cli.data.dataset import prepare_data
from linchain_cli.data.encoding import text_encoder
from linchain_cli.data.mixture import hold_out, rows_by_source
from linchain_cli.data.store import EncodedStore
from linchain_cli.data.templates import get_template
from linchain_cli.errors import InputError
from linchain_cli.model.limits import Limits


def all_rows(encoded) -> list[tuple[list[int], list[bool]]]:
    return [
        (ids.tolist(), supervised.tolist()) for ids, supervised in (encoded[i] for i in range(len(encoded)))
    ]


def test_rows_are_those_of_the_encoder_in_file_order(prepare, train, rows, byte_level):
    prepared = prepare(train)
    template = get_template("alpaca", byte_level)
    expected = text_encoder(byte_level).encode(
        [rendered for row in rows for rendered in template.render(row)], adds_bos=True, max_length=256
    )
    assert all_rows(prepared.train) == [(row.input_ids.tolist(), row.supervised.tolist()) for row in expected]
    assert prepared.train.lengths.tolist() == [len(row.input_ids) for row in expected]
    assert prepared.train.supervised_counts.tolist() == [int(row.supervised.sum()) for row in expected]
    ids, supervised = prepared.train[0]
    assert (ids.dtype, supervised.dtype) == (np.int32, np.bool_)
    assert prepared.validation is None
    with pytest.raises(IndexError):
        prepared.train[50]


def test_the_report_adds_up(prepare, write, rows, byte_level):
    first = write("a.json", json.dumps(rows[:20]))
    second = write(
        "b.jsonl", "\n".join(json.dumps(row) for row in rows[20:]) + '\nnonsense\n{"instruction": "x"}\n'
    )
    straddle = {"prompt": "Q: {instruction}\nA: ", "response": "{output}"}
    report = prepare([str(first), str(second)], on_bad_row="skip", template=straddle).report
    assert [(source.total, source.kept, source.skipped) for source in report.sources] == [
        (20, 20, 0),
        (32, 30, 2),
    ]
    assert (report.total, report.kept, report.skipped) == (52, 50, 2)
    assert len(report.bad_examples) == 2 and f"{second}:31 (row 31): not JSON" in report.bad_examples[0]
    assert report.straddling_rows == report.straddling_tokens == 50
    counts = json.loads(json.dumps(report.counts()))
    assert (counts["total"], counts["kept"], counts["skipped"]) == (52, 50, 2)
    assert counts["sources"][1]["skipped"] == 2


def test_held_out_rows_are_apart_and_always_the_same(prepare, train):
    whole = all_rows(prepare(train).train)
    first, again = (prepare(train, validation=7) for _ in range(2))
    other = prepare(train, validation=7, split_seed=1)
    assert (len(first.train), len(first.validation)) == (43, 7)
    assert sorted(all_rows(first.train) + all_rows(first.validation)) == sorted(whole)
    assert all_rows(first.validation) == all_rows(again.validation) != all_rows(other.validation)
    for encoded in (first.train, first.validation):
        assert encoded.lengths.tolist() == [len(ids) for ids, _ in all_rows(encoded)]
        assert encoded.supervised_counts.tolist() == [sum(supervised) for _, supervised in all_rows(encoded)]
    with pytest.raises(InputError, match="50 rows cannot be held out of 50"):
        prepare(train, validation=50)


def test_the_held_out_rows_never_change_between_versions(prepare, train):
    validation = prepare(train, validation=5).validation
    assert [validation.store_row(i) for i in range(5)] == [13, 17, 30, 39, 45]


@pytest.mark.parametrize(("rows", "held_out"), [(2, 1), (19, 1), (200, 20), (1200, 120), (170_420, 120)])
def test_auto_holds_out_at_most_a_tenth_of_the_rows(rows, held_out):
    train, validation = hold_out(
        SimpleNamespace(num_rows=rows, num_groups=rows, groups=lambda: None), "auto", 42
    )
    assert (len(train), len(validation)) == (rows - held_out, held_out)
    _, asked = hold_out(SimpleNamespace(num_rows=rows, num_groups=rows, groups=lambda: None), held_out, 42)
    assert [asked.store_row(i) for i in range(held_out)] == [validation.store_row(i) for i in range(held_out)]


def test_validation_from_a_file(prepare, train, write, rows):
    path = write("validation.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:3]) + json.dumps(
        {"instruction": "new", "output": "true"}))  # fmt: skip
    prepared = prepare(train, validation=str(path))
    assert (len(prepared.train), len(prepared.validation)) == (50, 4)
    assert prepared.validation_report.total == 4
    assert prepared.report.warnings == ["3 of 4 validation rows also occur among the training rows"]


def test_rows_without_a_supervised_token_stop_the_run(prepare, write, rows):
    long = {"instruction": "so " * 300, "output": "true"}
    path = str(write("x.json", json.dumps([rows[0], long, rows[1], long], indent=1)))
    with pytest.raises(InputError) as caught:
        prepare(path, max_length=256)
    message = str(caught.value)
    assert "2 of 4 rows (50.0%) have no supervised token" in message
    assert f"{path}:8 (row 2): " in message and f"{path}:18 (row 4): " in message
    with pytest.raises(InputError, match="50.0%.*now 0.4"):
        prepare(path, max_length=256, max_unsupervised_share=0.4)
    prepared = prepare(path, max_length=256, max_unsupervised_share=0.5)
    assert len(prepared.train) == 2
    counts = prepared.report.counts()
    assert (counts["total"], counts["kept"], counts["skipped"], counts["unsupervised"]) == (4, 2, 2, 2)
    with pytest.raises(InputError, match="4 of 4 rows"):
        prepare(str(write("y.json", json.dumps([long] * 4))), max_length=256, max_unsupervised_share=1.0)


def test_truncated_rows_are_counted(prepare, write):
    rows = [{"instruction": "a", "output": "true " * length} for length in (1, 50, 100)]
    report = prepare(str(write("x.json", json.dumps(rows))), template="plain", max_length=80).report
    assert report.truncated == 1 and report.longest > 80


@pytest.mark.parametrize(
    "row, said",
    [
        ({"instruction": "x", "output": " "}, "'output' is empty"),
        ({"instruction": "x", "output": "\ud800"}, r"'output' holds half a character \(.ud800"),
        (
            {"instruction": "x" * 5_000_001, "output": "y"},
            "'instruction' makes a text of 5,0.* the limit is 5,000,000",
        ),
    ],
)
def test_rows_that_cannot_be_encoded_are_bad_rows(prepare, write, row, said):
    path = str(write("x.json", json.dumps([{"instruction": "a", "output": "b"}, row])))
    with pytest.raises(InputError, match=rf"x.json:1 \(row 2\): {said}"):
        prepare(path)
    report = prepare(path, on_bad_row="skip").report
    assert (report.total, report.kept, report.skipped) == (2, 1, 1)


def test_a_cell_of_fifty_megabytes_is_refused_quickly(prepare, write):
    path = str(
        write(
            "x.jsonl",
            '{"instruction": "a", "output": "b"}\n{"instruction": "'
            + "x " * 25_000_000
            + '", "output": "b"}\n',
        )
    )
    started = time.monotonic()
    with pytest.raises(InputError, match="x.jsonl:2 .*50,000,"):
        prepare(path)
    assert time.monotonic() - started < 10


def test_conversations(prepare, write):
    turns = [{"role": "user", "content": "one?"}, {"role": "assistant", "content": "eins"}]
    path = str(write("x.jsonl", "".join(json.dumps({"messages": turns * n}) + "\n" for n in (1, 2, 3))))
    prepared = prepare(path, template="chat")
    assert (np.diff(prepared.train.supervised_counts) > 0).all()
    assert all_rows(prepare(path).train) == all_rows(prepared.train), "auto takes chat for conversations"
    with pytest.raises(
        InputError, match=r"x.jsonl:1 \(row 1\): there is no column 'instruction' \(columns: messages\)"
    ):
        prepare(path, template="alpaca")
    bad = str(write("y.jsonl", json.dumps({"messages": [{"role": "user"}]})))
    with pytest.raises(InputError, match=r"y.jsonl:1 \(row 1\): turn 1 of 'messages'"):
        prepare(bad, template="chat")


def test_no_end_of_sequence_token_is_a_warning(prepare, train, byte_level):
    tokenizer = copy.deepcopy(byte_level)
    tokenizer.eos_token = None
    assert "no end-of-sequence token" in prepare(train, tokenizer=tokenizer).report.warnings[0]


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_rows_that_occur_on_both_sides_are_counted(prepare, write, rows, block):
    path = str(write("x.json", json.dumps(rows[:10] * 2 + rows[10:20])))
    prepared = prepare(path, validation=8)
    train, validation = all_rows(prepared.train), all_rows(prepared.validation)
    expected = sum(row in train for row in validation)
    assert 0 < expected < 8
    assert prepared.validation.repeated_in(prepared.train, block) == expected
    assert prepared.report.warnings == [f"{expected} of 8 validation rows also occur among the training rows"]


@pytest.fixture
def long_rows(write):
    rows = [{"instruction": "a", "output": "true " * length} for length in (1, 50, 100)]
    return str(write("long.json", json.dumps(rows, indent=0)))


def test_rows_that_are_too_long_are_cut_dropped_or_refused(prepare, long_rows):
    cut = prepare(long_rows, template="plain", max_length=80)
    assert cut.train.lengths.tolist()[-1] == 80
    assert "1 of 3 rows are longer than data.max_length (80 tokens; the longest" in cut.report.warnings[0]
    dropped = prepare(long_rows, template="plain", max_length=80, on_long_row="drop")
    assert len(dropped.train) == 2
    counts = dropped.report.counts()
    assert (counts["total"], counts["kept"], counts["skipped"], counts["long"]) == (3, 2, 1, 1)
    assert "1 rows with more than 80 tokens are left out" in dropped.report.warnings[0]
    with pytest.raises(InputError, match=r"long.json:\d+ \(row 3\): the row has \d+ tokens.*on_long_row"):
        prepare(long_rows, template="plain", max_length=80, on_long_row="error")
    with pytest.raises(InputError, match="all 3 rows have more than data.max_length"):
        prepare(long_rows, template="plain", max_length=2, on_long_row="drop")


def test_auto_length_is_what_the_model_reads(prepare, long_rows, byte_level):
    tokenizer = copy.deepcopy(byte_level)
    for reads, length in ((70, 70), (100_000, 2048), (int(1e30), 2048)):
        tokenizer.model_max_length = reads
        prepared = prepare(long_rows, tokenizer=tokenizer, template="plain")
        assert prepared.config.max_length == length
    assert not prepared.report.truncated


@pytest.mark.parametrize("train_on_inputs", [False, True])
def test_a_row_whose_answer_is_cut_off_teaches_nothing(prepare, write, train_on_inputs):
    rows = [{"instruction": "so " * 40, "output": "true"}, {"instruction": "so", "output": "true"}]
    path = str(write("x.json", json.dumps(rows)))
    with pytest.raises(InputError, match="1 of 2 rows .* have no supervised token"):
        prepare(path, template="plain", max_length=20, train_on_inputs=train_on_inputs)
    prepared = prepare(
        path, template="plain", max_length=20, train_on_inputs=train_on_inputs, max_unsupervised_share=0.5
    )
    assert prepared.report.unsupervised == 1 and len(prepared.train) == 1


def test_a_share_of_the_rows_validates(prepare, train):
    whole = prepare(train)
    prepared = prepare(train, validation="10%")
    assert (len(prepared.train), len(prepared.validation)) == (45, 5)
    assert all_rows(prepared.validation) == all_rows(prepare(train, validation=5).validation)
    assert sorted(all_rows(prepared.train) + all_rows(prepared.validation)) == sorted(all_rows(whole.train))


def test_validation_from_a_source_with_its_own_columns_and_slice(prepare, train, write):
    rows = [{"q": f"question {number}", "a": "yes"} for number in range(9)]
    path = str(write("dev.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    source = {"path": path, "columns": {"instruction": "q", "output": "a"}, "split": "dev[2:6]"}
    prepared = prepare(train, validation=source)
    assert (len(prepared.train), len(prepared.validation)) == (50, 4)
    assert prepared.validation_report.sources[0].total == 4


def test_validation_from_several_sources(prepare, train, write, rows):
    first = str(write("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows[:7])))
    talks = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
        for n in range(3)
    ]
    second = str(write("b.jsonl", "".join(json.dumps(row) + "\n" for row in talks)))
    prepared = prepare(train, validation=[first, {"path": second, "split": "b[:2]"}])
    assert [source.total for source in prepared.validation_report.sources] == [7, 2]
    assert len(prepared.validation) == 9
    settled = prepared.config.validation
    assert [(one.path, one.split, one.template) for one in settled] == [
        (first, "validation", "alpaca"),
        (second, "b[:2]", "chat"),
    ]
    again = prepare(train, **prepared.config.model_dump(include={"validation"}))
    assert all_rows(again.validation) == all_rows(prepared.validation)
    found = {name: part.tolist() for name, part in prepared.validation_sources.items()}
    assert found == {"a.jsonl": list(range(7)), "b.jsonl": [7, 8]}


def test_held_out_rows_know_their_source(prepare, write, rows, tmp_path):
    for folder in "xy":
        (tmp_path / folder).mkdir()
    first, second, third = (
        str(write(f"{name}.json", json.dumps(part)))
        for name, part in (("x/train", rows[:20]), ("y/train", rows[20:45]), ("z", rows[45:46]))
    )
    prepared = prepare([first, second, third], validation=10)
    parts, held_out = prepared.validation_sources, prepared.validation.store_rows()
    assert parts.keys() <= {"x/train.json", "y/train.json", "z.json"} and len(parts) > 1
    assert sorted(np.concatenate(list(parts.values()))) == list(range(10))
    assert (held_out[parts["x/train.json"]] < 20).all()
    assert ((held_out[parts["y/train.json"]] >= 20) & (held_out[parts["y/train.json"]] < 45)).all()
    assert prepare([first], validation=5).validation_sources == {}
    assert prepare([first, second], validation=0).validation_sources == {}
    twice = prepare([first, {"path": first, "split": "train[:5]"}], validation=20).validation_sources
    assert list(twice) == ["train.json-1", "train.json-2"]


def numbered(count):
    """Rows of which only is asked which of a store's they are."""
    return SimpleNamespace(store_rows=lambda: np.arange(count))


def test_names_of_sources_are_short_and_suit_trackers():
    names = ["/data/boolq/train.json", "/data/piqa/train.json", "data/*.jsonl", "owner/set", "owner/set"]
    found = rows_by_source(numbered(5), names, [1] * 5)
    assert list(found) == [
        "boolq/train.json",
        "piqa/train.json",
        "data/_.jsonl",
        "owner/set-1",
        "owner/set-2",
    ]
    assert rows_by_source(numbered(50), [str(number) for number in range(50)], [1] * 50) == {}
    assert list(rows_by_source(numbered(3), ["a", "b", "c"], [2, 0, 1])) == ["a", "c"]


def test_the_validation_split_of_a_directory(prepare, write, rows, tmp_path):
    (tmp_path / "set").mkdir()
    for name, part in (("train", rows[:30]), ("validation", rows[30:36])):
        write(f"set/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    prepared = prepare(f"{tmp_path}/set", validation=f"{tmp_path}/set")
    assert (len(prepared.train), len(prepared.validation)) == (30, 6)
    (tmp_path / "set" / "validation.jsonl").unlink()
    with pytest.raises(InputError, match="no split 'validation'. Splits: train"):
        prepare(f"{tmp_path}/set", validation=f"{tmp_path}/set")


def test_sources_come_as_often_as_their_weights_say(prepare, write, rows):
    first = str(write("a.json", json.dumps(rows[:20])))
    second = str(write("b.json", json.dumps(rows[20:30])))
    mixed = prepare([{"path": first, "weight": 0.25}, {"path": second, "weight": 2.5}], validation=6)
    plain = prepare([first, second], validation=6)
    assert all_rows(mixed.validation) == all_rows(plain.validation)
    kept, of_first = all_rows(plain.train), all_rows(prepare(first).train)
    ours, others = ([row for row in kept if (row in of_first) is mine] for mine in (True, False))
    found = all_rows(mixed.train)
    assert sum(row in ours for row in found) == round(len(ours) / 4)
    assert {found.count(row) for row in others} == {2, 3}
    assert sum(found.count(row) for row in others) == 2 * len(others) + round(len(others) / 2)
    assert mixed.train.lengths.tolist() == [len(ids) for ids, _ in found]
    assert mixed.report.fingerprint != plain.report.fingerprint
    assert mixed.report.cached is False and prepare([first, second]).report.cached
    assert all_rows(prepare([{"path": first, "weight": 1}, second], validation=6).train) == kept


def test_the_rows_of_one_conversation_are_held_out_together(tmp_path):
    from linchain_cli.data.encoding import EncodedText
    from linchain_cli.data.store import StoreWriter

    def row(token: int, length: int) -> EncodedText:
        return EncodedText(np.full(length, token, np.int32), np.ones(length, bool), 0, length)

    with StoreWriter(tmp_path) as writer:
        writer.append([row(token, length) for length in range(1, token % 3 + 1)] for token in range(20))
        writer.append([[row(20, 4)]])
        writer.finish()
    store = EncodedStore(tmp_path)
    assert store.num_groups == 14 + 0 and store.num_rows == 20
    train, validation = hold_out(store, 4, 42)
    tokens = [
        {int(ids[0]) for ids, _ in map(rows.__getitem__, range(len(rows)))} for rows in (train, validation)
    ]
    assert len(tokens[1]) == 4 and not tokens[0] & tokens[1]
    assert len(train) + len(validation) == 20


def test_tokens_that_the_model_has_no_embedding_for_are_named_with_their_row(
    tmp_path, byte_level, data_config, rows, write
):
    tokenizer = copy.deepcopy(byte_level)
    known = len(tokenizer)
    tokenizer.add_tokens(["ZEBRA"])
    rows[30]["instruction"] += " ZEBRA"
    train = str(write("zebra.json", json.dumps(rows)))

    def prepare(limits=None):
        return prepare_data(data_config(train), tokenizer, limits, cache_dir=tmp_path / "cache")

    prepare(Limits(embeddings=known + 1))
    for _ in range(2):  # also where the rows lie encoded already
        with pytest.raises(InputError) as told:
            prepare(Limits(embeddings=known))
        assert f"zebra.json:1 (row 31): the token 'ZEBRA' has the id {known}" in str(told.value)
        assert f"the model's embeddings end at {known - 1}" in str(told.value)
    del rows[30]
    write("zebra.json", json.dumps(rows))
    assert len(prepare(Limits(embeddings=known)).train) == 49, "a token that no row has is no error"


def test_rows_longer_than_the_model_can_read(prepare, train, byte_level, tmp_path, data_config):
    longest = int(prepare(train).train.lengths.max())

    def with_limits(table: bool, positions: int, **fields):
        config = data_config(train, **fields)
        return prepare_data(config, byte_level, Limits(10**6, positions, table), cache_dir=tmp_path / "cache")

    assert with_limits(True, longest).report.warnings == []
    short = longest - 4
    with pytest.raises(InputError, match=f"has {longest} tokens, and the model has {short} positions"):
        with_limits(True, short)
    with_limits(True, short, max_length=short)
    (warning,) = with_limits(False, short).report.warnings
    assert f"was made for {short}" in warning and f"set data.max_length to at most {short}" in warning
