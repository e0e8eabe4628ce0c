"""Raw rows of each benchmark, written by hand, beside the prompt they have to become."""

from __future__ import annotations

import re

import pytest

from linchain_cli.evaluation import raw
from linchain_cli.evaluation.task import read_row, row_options
from linchain_cli.evaluation.tasks import SPECS

CHOICES = {"text": ["a shell", "a stone ", "a leaf"], "label": ["A", "B", "C"]}
EXAMPLES = {
    "boolq": (
        {"question": "is a whale a fish", "passage": "Whales breathe air.", "answer": False},
        "Please answer the following question with true or false, question: is a whale a fish?\n\n"
        "Answer format: true/false",
        "false",
    ),
    "piqa": (
        {"goal": "dry a plate", "sol1": "wipe it ", "sol2": "wet it", "label": 0},
        "Please choose the correct solution to the question: dry a plate\n\nSolution1: wipe it \n\n"
        "Solution2: wet it\n\nAnswer format: solution1/solution2",
        "solution1",
    ),
    "social_i_qa": (
        {
            "context": "Kim lost a key.",
            "question": "How does Kim feel?",
            "answerA": "glad",
            "answerB": "upset",
            "answerC": "proud",
            "label": "2",
        },
        "Please choose the correct answer to the question: Kim lost a key. How does Kim feel?\n\n"
        "Answer1: glad Answer2: upset Answer3: proud\n\nAnswer format: answer1/answer2/answer3",
        "answer2",
    ),
    "hellaswag": (
        {
            "activity_label": "Baking bread",
            "ctx_a": "A man kneads dough.",
            "ctx_b": "he",
            "ctx": "A man kneads dough. he",
            "endings": ["sings.", "puts it in the oven.", "sleeps.", "runs away."],
            "label": "1",
        },
        "Please choose the correct ending to complete the given sentence: "
        "Baking bread: A man kneads dough. he\n\n"
        "Ending1: sings. Ending2: puts it in the oven. Ending3: sleeps. Ending4: runs away.\n\n"
        "Answer format: ending1/ending2/ending3/ending4",
        "ending2",
    ),
    "winogrande": (
        {
            "sentence": "The cup fell off the shelf, so _ broke.",
            "option1": "cup",
            "option2": "shelf",
            "answer": "1",
        },
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        "The cup fell off the shelf, so _ broke.\n\n"
        "Option1: cup Option2: shelf Answer format: option1/option2",
        "option1",
    ),
    "ARC-Easy": (
        {"question": "What does a snail carry?", "choices": CHOICES, "answerKey": "A"},
        "Please choose the correct answer to the question: What does a snail carry?\n\n"
        "Answer1: a shell Answer2: a stone  Answer3: a leaf\n\nAnswer format: answer1/answer2/answer3",
        "answer1",
    ),
    "ARC-Challenge": (
        {
            "question": "Which is alive?",
            "choices": {"text": ["iron", "moss", "sand", "salt", "ice"], "label": ["1", "2", "3", "4", "5"]},
            "answerKey": "2",
        },
        "Please choose the correct answer to the question: Which is alive?\n\n"
        "Answer1: iron Answer2: moss Answer3: sand Answer4: salt Answer5: ice\n\n"
        "Answer format: answer1/answer2/answer3/answer4/answer5",
        "answer2",
    ),
    "openbookqa": (
        {
            "question_stem": "Fog forms near",
            "choices": {"text": ["a lake", "a desert", "a lamp", "a road"], "label": ["A", "B", "C", "D"]},
            "answerKey": "D",
        },
        "Please choose the correct answer to the question: Fog forms near\n\n"
        "Answer1: a lake Answer2: a desert Answer3: a lamp Answer4: a road\n\n"
        "Answer format: answer1/answer2/answer3/answer4",
        "answer4",
    ),
    "gsm8k": (
        {"question": "Ann has 1,000 pens and buys 72. How many?", "answer": "1000 + 72 = 1072\n#### 1,072"},
        "Ann has 1,000 pens and buys 72. How many?",
        "1072.0",
    ),
    "SVAMP": (
        {
            "Body": "Tom has 3 cats ",
            "Question": "How many legs have they?",
            "Answer": "12.0",
            "Type": "Multiplication",
        },
        "Tom has 3 cats How many legs have they?",
        "12.0",
    ),
    "MultiArith": ({"question": " Sue has 2 bags. ", "final_ans": "14"}, " Sue has 2 bags. ", "14.0"),
    "AQuA": (
        {
            "question": "What is x? ",
            "options": ["A)2/(xy)", "B)7 gms", "C)3", "D)4", "E)none"],
            "rationale": "x is 7",
            "correct": "B",
        },
        "What is x? Answer Choices: (A) 2/ (xy)  (B) 7 gms (C) 3 (D) 4 (E) none",
        "B",
    ),
}


@pytest.mark.parametrize("task", raw.RAW_SOURCES)
def test_a_raw_row_becomes_the_prompt_of_the_file(task):
    given, instruction, answer = EXAMPLES[task]
    row = raw.RAW_SOURCES[task].build(given)
    assert row["instruction"] == instruction
    assert row["answer"] == answer
    checked = read_row(row, 0, SPECS[task].rule, task)
    if SPECS[task].rule.kind == "options":
        assert row["output"] == f"the correct answer is {answer}"
        assert checked.options == row_options(instruction)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("piqa", {"label": -1}),
        ("winogrande", {"answer": ""}),
        ("social_i_qa", {"label": "4"}),
        ("hellaswag", {"label": ""}),
        ("ARC-Easy", {"answerKey": "E"}),
        ("gsm8k", {"answer": "seventy-two"}),
    ],
)
def test_an_unlabelled_raw_row_is_an_error(task, change):
    with pytest.raises(ValueError):
        raw.RAW_SOURCES[task].build({**EXAMPLES[task][0], **change})


def test_every_commonsense_task_can_be_built():
    commonsense = {name for name, spec in SPECS.items() if spec.group == "commonsense"}
    assert len(commonsense) == 8 and commonsense <= set(raw.RAW_SOURCES)


def test_a_row_says_itself_how_many_options_it_has():
    assert row_options("Q\n\nAnswer1: a Answer format: x\n\nAnswer format: answer1/answer2/answer3") == (
        "answer1",
        "answer2",
        "answer3",
    )
    assert row_options("Q?") == ()


def test_every_source_is_read_at_a_commit():
    assert all(re.fullmatch(r"[0-9a-f]{40}", source.revision) for source in raw.RAW_SOURCES.values())
