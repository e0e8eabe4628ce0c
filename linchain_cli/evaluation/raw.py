"""Rows of the benchmarks' own data sets, turned into the prompts of the LLM-Adapters files.

The prompts are the same to the character, trailing blanks of the raw text included. Each function takes
one raw row and returns `{"instruction", "input", "output", "answer"}`; a missing field is a KeyError.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ANSWER_PREFIX = "the correct answer is "

Row = dict[str, str]


def _choice_row(text: str, names: Sequence[str], answer: str, separator: str = "\n\n") -> Row:
    if answer not in names:
        raise ValueError(f"its label names none of {'/'.join(names)}")
    return {
        "instruction": f"{text}{separator}Answer format: {'/'.join(names)}",
        "input": "",
        "output": f"{ANSWER_PREFIX}{answer}",
        "answer": answer,
    }


def _numbered(word: str, count: int) -> list[str]:
    return [f"{word}{number}" for number in range(1, count + 1)]


def _listed(names: Sequence[str], texts: Sequence[str], separator: str = " ") -> str:
    return separator.join(f"{name.capitalize()}: {text}" for name, text in zip(names, texts, strict=True))


def boolq(raw: Mapping[str, Any]) -> Row:
    """question, answer (bool). The passage is not shown, as in the LLM-Adapters files."""
    text = f"Please answer the following question with true or false, question: {raw['question']}?"
    return _choice_row(text, ["true", "false"], "true" if raw["answer"] else "false")


def piqa(raw: Mapping[str, Any]) -> Row:
    """goal, sol1, sol2, label (0 or 1)."""
    names = _numbered("solution", 2)
    listed = _listed(names, [raw["sol1"], raw["sol2"]], "\n\n")
    text = f"Please choose the correct solution to the question: {raw['goal']}\n\n{listed}"
    return _choice_row(text, names, f"solution{int(raw['label']) + 1}")


def social_i_qa(raw: Mapping[str, Any]) -> Row:
    """context, question, answerA, answerB, answerC, label ("1" to "3")."""
    names = _numbered("answer", 3)
    listed = _listed(names, [raw["answerA"], raw["answerB"], raw["answerC"]])
    text = f"Please choose the correct answer to the question: {raw['context']} {raw['question']}\n\n{listed}"
    return _choice_row(text, names, f"answer{str(raw['label']).strip()}")


def hellaswag(raw: Mapping[str, Any]) -> Row:
    """activity_label, ctx, endings, label ("0" to "3")."""
    names = _numbered("ending", len(raw["endings"]))
    listed = _listed(names, raw["endings"])
    sentence = f"{raw['activity_label']}: {raw['ctx']}"
    text = f"Please choose the correct ending to complete the given sentence: {sentence}\n\n{listed}"
    return _choice_row(text, names, f"ending{int(raw['label']) + 1}")


def winogrande(raw: Mapping[str, Any]) -> Row:
    """sentence, option1, option2, answer ("1" or "2")."""
    names = _numbered("option", 2)
    listed = _listed(names, [raw["option1"], raw["option2"]])
    text = (
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{raw['sentence']}\n\n{listed}"
    )
    return _choice_row(text, names, f"option{raw['answer']}", separator=" ")


def arc(raw: Mapping[str, Any]) -> Row:
    """question, choices {text, label}, answerKey (a letter or a digit, as in choices.label)."""
    return _multiple_choice(raw["question"], raw["choices"], raw["answerKey"])


def openbookqa(raw: Mapping[str, Any]) -> Row:
    """question_stem, choices {text, label}, answerKey."""
    return _multiple_choice(raw["question_stem"], raw["choices"], raw["answerKey"])


def _multiple_choice(question: str, choices: Mapping[str, Sequence[str]], key: str) -> Row:
    names = _numbered("answer", len(choices["text"]))
    if key not in choices["label"]:
        raise ValueError(f"its answerKey {key!r} is none of its labels {list(choices['label'])}")
    text = (
        f"Please choose the correct answer to the question: {question}\n\n{_listed(names, choices['text'])}"
    )
    return _choice_row(text, names, names[list(choices["label"]).index(key)])


def gsm8k(raw: Mapping[str, Any]) -> Row:
    """question, answer (a rationale that ends in "#### 72")."""
    rationale, _, number = raw["answer"].rpartition("####")
    if not rationale:
        raise ValueError("its answer has no '####' before the result")
    number = number.strip().replace(",", "")
    return {
        "instruction": raw["question"],
        "input": "",
        "output": rationale.strip(),
        "answer": str(float(number)),
    }


def svamp(raw: Mapping[str, Any]) -> Row:
    """Body, Question, Answer."""
    question = f"{raw['Body'].strip()} {raw['Question'].strip()}"
    return {"instruction": question, "input": "", "output": "", "answer": str(float(raw["Answer"]))}


def multi_arith(raw: Mapping[str, Any]) -> Row:
    """question, final_ans."""
    return {"instruction": raw["question"], "input": "", "output": "", "answer": str(float(raw["final_ans"]))}


def aqua(raw: Mapping[str, Any]) -> Row:
    """question, options ("A)21", ...), correct (a letter). The files have a blank outside every bracket."""
    listed = f"({'('.join(raw['options'])}".replace("(", " (").replace(")", ") ")
    question = f"{raw['question'].strip()} Answer Choices:{listed}"
    return {
        "instruction": question,
        "input": "",
        "output": raw.get("rationale", ""),
        "answer": raw["correct"],
    }


@dataclass(frozen=True)
class RawSource:
    """A hub data set and how its rows become prompts. Of two splits joined, the order is the hub's."""

    path: str
    build: Callable[[Mapping[str, Any]], Row]
    name: str | None = None
    split: str = "validation"
    revision: str | None = None

    def __str__(self) -> str:
        return " ".join(filter(None, [self.path, self.name, f"({self.split})"]))


ARC = "210d026faf9955653af8916fad021475a3f00453"
# Each at a commit, so that the same rows are asked whenever. PIQA and Social IQa are script data sets, which
# current `datasets` reads only as converted parquet: their commits are of refs/convert/parquet.
RAW_SOURCES: dict[str, RawSource] = {
    "boolq": RawSource("google/boolq", boolq, revision="35b264d03638db9f4ce671b711558bf7ff0f80d5"),
    "piqa": RawSource("ybisk/piqa", piqa, revision="142c51238b3ca2bc61e9a075913871b8b600e8e1"),
    "social_i_qa": RawSource(
        "allenai/social_i_qa", social_i_qa, revision="537a2ec8ec565adc0b70b70752893e59e024df26"
    ),
    "hellaswag": RawSource("Rowan/hellaswag", hellaswag, revision="218ec52e09a7e7462a5400043bb9a69a41d06b76"),
    "winogrande": RawSource(
        "allenai/winogrande",
        winogrande,
        name="winogrande_xl",
        revision="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    ),
    "ARC-Easy": RawSource("allenai/ai2_arc", arc, name="ARC-Easy", split="test", revision=ARC),
    "ARC-Challenge": RawSource("allenai/ai2_arc", arc, name="ARC-Challenge", split="test", revision=ARC),
    "openbookqa": RawSource(
        "allenai/openbookqa",
        openbookqa,
        name="main",
        split="test",
        revision="388097ea7776314e93a529163e0fea805b8a6454",
    ),
    "gsm8k": RawSource(
        "openai/gsm8k", gsm8k, name="main", split="test", revision="740312add88f781978c0658806c59bc2815b9866"
    ),
    "SVAMP": RawSource(
        "ChilleD/SVAMP", svamp, split="train+test", revision="5e0bf1e5e7c0e9c4bc39180d224f41f3f801b7ef"
    ),
    "AQuA": RawSource(
        "deepmind/aqua_rat",
        aqua,
        name="raw",
        split="test",
        revision="33301c6a050c96af81f63cad5562cb5363e88971",
    ),
    "MultiArith": RawSource(
        "ChilleD/MultiArith",
        multi_arith,
        split="train+test",
        revision="144d44c3fb87c0b9097ac9593c789e716a282e3e",
    ),
}
