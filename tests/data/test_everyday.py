"""The everyday rows: their format, their truth, and that nothing but understanding tells the answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest

from linchain_cli.data.everyday import STYLES, _Writer, everyday_rows, words
from linchain_cli.data.everyday_facts import GOALS, PROPERTIES, SIZES
from linchain_cli.data.everyday_words import KINDS, WITHOUT_ARTICLE
from linchain_cli.errors import InputError
from linchain_cli.evaluation.task import row_options

SPLITS = ("train", "test")
KIND_OF = {word: kind for kind, all_words in KINDS.items() for word in all_words}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    return {split: everyday_rows(split) for split in SPLITS}


def options(row: dict[str, str]) -> list[str]:
    return row["instruction"].rpartition("Answer format: ")[2].split("/")


def style(row: dict[str, str]) -> str:
    names = options(row)
    if names == ["true", "false"]:
        return "boolq"
    return "piqa" if "correct solution" in row["instruction"] else f"answers{len(names)}"


def place(row: dict[str, str]) -> int:
    return options(row).index(row["answer"])


def things(text: str) -> list[str]:
    """Every word of the lexicon in a text, whole words only, singular or plural, in any case."""
    found = (re.sub(r"[^a-z]", "", part) for part in re.split(r"[\s/]+", text.lower()))
    return [
        name
        for part in found
        for name in (part, part.removesuffix("s"), part.removesuffix("es"))
        if name in LOWER
    ]


LOWER = {word.lower(): word for word in KIND_OF}


def kind_in(text: str) -> str:
    (word,) = set(things(text))
    return KIND_OF[LOWER[word]]


# The promise that a test row is about things never trained on


def test_no_thing_of_a_test_row_occurs_in_any_training_row(rows):
    seen = {split: {word for row in rows[split] for word in things(row["instruction"])} for split in SPLITS}
    assert len(seen["test"]) > 150 and len(seen["train"]) > 200
    assert not seen["test"] & seen["train"]
    # And by the text itself, whatever `things` makes of it.
    training_text = " ".join(row["instruction"] for row in rows["train"]).lower()
    for word in seen["test"]:
        assert not re.search(rf"\b{word}(s|es)?\b", training_text), word


def test_the_words_are_divided_without_rest():
    train, test = words("train"), words("test")
    for kind, all_words in KINDS.items():
        assert sorted(train[kind] + test[kind]) == sorted(all_words)
        assert len(train[kind]) >= 3 and len(test[kind]) >= 2, kind


def test_every_word_stands_in_one_kind_and_in_no_question():
    counts = Counter(word.lower() for all_words in KINDS.values() for word in all_words)
    assert [word for word, count in counts.items() if count > 1] == []
    asked = [text for fact in PROPERTIES for text in (fact.question, fact.choice)]
    asked += [text for goal in GOALS for text in (goal.wish, goal.solution, goal.choice)]
    assert [(text, things(text)) for text in asked if things(text)] == []


# Truth


def test_facts_name_kinds_that_exist_and_do_not_contradict_themselves():
    for fact in (*PROPERTIES, *GOALS):
        assert set(fact.yes) | set(fact.unclear) <= set(KINDS), fact
        assert fact.yes and len(fact.no) >= 4, fact
        assert not set(fact.yes) & set(fact.unclear), fact
        assert set(fact.yes) | set(fact.unclear) | set(fact.no) == set(KINDS)
    assert {kind for fact in PROPERTIES for kind in fact.yes} == set(KINDS)


def test_every_answer_follows_from_the_facts(rows):
    """Reads each row's text back and decides it again, from the tables and not through the generator."""
    by_question = {fact.question.replace("{x}", "X"): fact for fact in PROPERTIES}
    by_choice = {fact.choice: fact for fact in (*PROPERTIES, *GOALS)}
    by_wish = {f"How can you {goal.wish}?": goal for goal in GOALS}
    size = {kind: rank for rank, kinds in enumerate(SIZES) for kind in kinds}
    checked = Counter()
    for row in rows["train"] + rows["test"]:
        head = row["instruction"].partition("\n\n")[0].partition("question: ")[2]
        if options(row) == ["true", "false"]:
            comparison = re.fullmatch(r"is (.*) (bigger|smaller) than (.*)\?", head)
            if comparison:
                difference = size[kind_in(comparison[1])] - size[kind_in(comparison[3])]
                assert difference
                truth = (difference > 0) == (comparison[2] == "bigger")
            else:
                (word,) = set(things(head))
                fact = by_question[re.sub(rf"(\ban? )?\b{word}\b", "X", head, flags=re.IGNORECASE)]
                assert kind_in(head) in (*fact.yes, *fact.no)
                truth = kind_in(head) in fact.yes
            assert row["answer"] == str(truth).lower(), row
        else:
            fact = by_wish.get(head) or by_choice[head]
            kinds = [kind_in(text) for text in options(row)]
            assert kinds.pop(place(row)) in fact.yes, row
            assert all(kind in fact.no for kind in kinds), row
        checked[style(row)] += 1
    assert checked == Counter(STYLES["train"]) + Counter(STYLES["test"])


# Format


def test_rows_are_of_the_commonsense170k_format_and_its_styles(rows):
    starts = {
        "boolq": "Please answer the following question with true or false, question: ",
        "piqa": "Please choose the correct solution to the question: How can you ",
        "answers": "Please choose the correct answer to the question: ",
    }
    for split in SPLITS:
        assert Counter(map(style, rows[split])) == STYLES[split]
        for row in rows[split]:
            names = options(row)
            assert set(row) == {"instruction", "input", "output", "answer"} and row["input"] == ""
            assert row["output"] == f"the correct answer is {row['answer']}" and row["answer"] in names
            assert row["instruction"].startswith(starts[style(row).rstrip("345")])
            assert row["instruction"].endswith("\n\nAnswer format: " + "/".join(names))
            assert len(names) == len(set(names))
            assert row_options(row["instruction"]) == tuple(names)  # as the evaluation reads them


def test_no_option_stands_in_the_question(rows):
    """Or it could be copied from there."""
    for row in rows["train"] + rows["test"]:
        if style(row) != "boolq":
            question = row["instruction"].rpartition("\n\nAnswer format: ")[0].lower()
            assert not any(re.search(rf"\b{re.escape(name.lower())}\b", question) for name in options(row))


def test_articles_fit_the_words(rows):
    for row in rows["train"] + rows["test"]:
        assert not re.search(r"\ba [aeio]", row["instruction"]), row
        assert not re.search(r"\ban [^aeiou]|\ban uk", row["instruction"]), row
        for kind in WITHOUT_ARTICLE:
            assert not re.search(rf"\ban? ({'|'.join(KINDS[kind])})\b", row["instruction"]), row


def test_no_row_comes_twice(rows):
    texts = [row["instruction"] for split in SPLITS for row in rows[split]]
    assert len(texts) == len(set(texts))


# No giveaways


@pytest.mark.parametrize("split", SPLITS)
def test_labels_and_places_are_balanced(rows, split):
    for kind, count in STYLES[split].items():
        places = Counter(place(row) for row in rows[split] if style(row) == kind)
        assert sorted(places) == list(range(max(2, int(kind[-1]) if kind[-1].isdigit() else 2)))
        assert max(places.values()) - min(places.values()) <= max(1, 0.02 * count)


def test_always_giving_one_answer_scores_low(rows):
    most_frequent = max(Counter(row["answer"] for row in rows["test"]).values())
    assert most_frequent / len(rows["test"]) < 1 / 3


def majority_by(rows, feature) -> float:
    """Accuracy of the best guess from one feature alone, in sample (so it leans to the high side)."""
    groups = defaultdict(Counter)
    for row in rows:
        groups[feature(row)][row["answer"]] += 1
    return sum(max(counts.values()) for counts in groups.values()) / len(rows)


def test_a_property_or_a_kind_alone_does_not_tell_true_from_false(rows):
    statements = [row for row in rows["train"] if row["answer"] in ("true", "false")]
    singles = [row for row in statements if not re.search("bigger|smaller", row["instruction"])]

    def kind(row):
        return kind_in(row["instruction"])

    def question(row):
        return re.sub(rf"(\ban? )?\b{things(row['instruction'])[0]}\b", "X", row["instruction"].lower())

    assert majority_by(singles, question) == 0.5
    # Few properties are asked, so a kind leans to one answer; knowing no more than the kinds' leanings stays
    # below this.
    assert majority_by(singles, kind) < 0.75
    assert majority_by(statements, lambda row: len(row["instruction"]) // 4) < 0.60


@pytest.mark.parametrize("name", ["piqa", "answers3", "answers5"])
def test_the_options_alone_do_not_tell_the_right_one(name):
    # More than a split has, so that chance does not blur the shares.
    chosen = _Writer("train").rows(name, 500)
    chance = sum(1 / len(options(row)) for row in chosen) / len(chosen)
    right, shown = Counter(), Counter()
    for row in chosen:
        kinds = [kind_in(text) for text in options(row)]
        shown.update(kinds)
        right[kinds[place(row)]] += 1

    def accuracy(score) -> float:
        hits = 0
        for row in chosen:
            scores = [score(text) for text in options(row)]
            hits += scores.index(max(scores)) == place(row)
        return hits / len(chosen)

    assert accuracy(len) < chance + 0.08 and accuracy(lambda text: -len(text)) < chance + 0.08
    assert accuracy(lambda text: right[kind_in(text)] / shown[kind_in(text)]) < chance + 0.10


# One data set, for ever


def test_the_rows_are_the_same_on_every_machine(rows):
    """Results are compared across machines and versions; a change of the rows must be meant."""
    digests = {split: hashlib.sha256(json.dumps(rows[split]).encode()).hexdigest()[:16] for split in SPLITS}
    assert digests == {"train": "2889bc352c2f5f8c", "test": "3659cec444f16a8d"}
    assert everyday_rows("test") == rows["test"]


def test_an_unknown_split_is_an_input_error():
    with pytest.raises(InputError, match="splits train and test, not 'validation'"):
        everyday_rows("validation")
