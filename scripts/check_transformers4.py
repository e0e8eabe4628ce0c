"""Loads merged checkpoints in transformers 4 and compares its greedy answers with transformers 5's.

What transformers 5 writes misled older readers without a word. This installs a transformers 4 into a
temporary directory (from the package index, beside the torch that is here), has it load each checkpoint by
itself, and compares ten greedy answers in float32, token by token.

    python scripts/check_transformers4.py runs/quickstart/merged [DIRECTORY ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# The last release of transformers 4 and what it needs in other versions than transformers 5.
PACKAGES = ("transformers==4.57.6", "huggingface_hub<1", "tokenizers<=0.23.0,>=0.22.0")
PROMPTS = (
    "The kettle began to whistle, so she",
    "Two plus two equals",
    "Question: Is the sea salty? Answer:",
    "def mean(values):\n    return",
    "In the north the winters are long, and",
    "Please list three colours:",
    "A ladder is used to",
    "Yesterday it rained; today",
    "The opposite of heavy is",
    "To open a jar that is shut tight,",
)


def answers(directory: Path, tokens: int) -> dict:
    """Greedy answers of the checkpoint in this process's transformers."""
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    dtype = "dtype" if transformers.__version__ >= "5" else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, **{dtype: torch.float32}).eval()
    found = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, num_beams=1)
        found.append(output[0, inputs["input_ids"].shape[1] :].tolist())
    return {"version": transformers.__version__, "tokenizer": type(tokenizer).__name__, "answers": found}


def call(directory: Path, tokens: int, path: Path | None) -> dict:
    """`answers` in a process of its own; `path` is searched for packages first."""
    environment = dict(os.environ, HF_HUB_OFFLINE="1", **({"PYTHONPATH": str(path)} if path else {}))
    command = [sys.executable, __file__, str(directory), "--tokens", str(tokens), "--answers"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{directory}: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIRECTORY")
    parser.add_argument("--tokens", type=int, default=24, help="length of each answer")
    parser.add_argument("--packages", type=Path, help="a directory that holds transformers 4 already")
    parser.add_argument("--answers", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.answers:
        print(json.dumps(answers(args.directories[0], args.tokens)))
        return
    with tempfile.TemporaryDirectory() as folder:
        packages = args.packages or Path(folder)
        if args.packages is None:
            install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder]
            subprocess.run([*install, *PACKAGES], check=True)
        failed = False
        for directory in args.directories:
            old, new = call(directory, args.tokens, packages), call(directory, args.tokens, None)
            equal = sum(one == other for one, other in zip(old["answers"], new["answers"], strict=True))
            failed |= equal < len(PROMPTS)
            print(
                f"{directory}: transformers {old['version']} and {new['version']} give {equal} of"
                f" {len(PROMPTS)} equal answers"
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
