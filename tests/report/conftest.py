"""A finished run with hostile text in its rows, made once for all tests; and pages read back: their elements
as a parser sees them, their layout as a browser sees it."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

# What must come out as text and never as markup, in the shapes that break careless pages.
HOSTILE = (
    "</pre></mark><script>alert('x')</script><img src=x onerror=\"alert(1)\">"
    "&lt;b&gt;\u202egnp.exe\x07 \U0001f9ea"
)

RECIPE = """
name: tiny
output_dir: {root}
seed: 3
model: {{path: {model}}}
adapter: {{rank: 4, depth: 2, alpha: 8}}
data:
  train: {rows}
  validation: 6
  max_length: 400
  template: {{prompt: "<i>{{instruction}}</i> & ", response: "{{output}}"}}
training: {{max_steps: 4, global_batch_size: 4, warmup_steps: 1, log_every: 1, eval_every: 2}}
"""


@pytest.fixture(scope="session")
def hostile() -> str:
    return HOSTILE


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LINCHAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path) -> Path:
    """The directory of a finished run; tests only read it."""
    from linchain_cli.chain.files import adapter_hash
    from linchain_cli.recipe import load_recipe
    from linchain_cli.training.runner import run_training

    root = tmp_path_factory.mktemp("runs")
    rows = [
        {"instruction": f"{i}: {HOSTILE}", "input": "", "output": f"answer {i} <u>{HOSTILE}"}
        for i in range(20)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "recipe.yaml").write_text(RECIPE.format(root=root, model=tiny_llama_dir, rows=root / "rows.json"))
    recipe = load_recipe(root / "recipe.yaml")
    run_training(recipe, brief=True)
    run = recipe.run_path
    (run / "eval").mkdir()
    task = {
        "accuracy": 0.625,
        "stderr": 0.1,
        "interval": [0.41, 0.8],
        "n": 24,
        "unparsable": 1,
        "majority": 0.5,
    }
    summary = {"model": "x", "protocol": "likelihood", "template": "alpaca", "dtype": "float32"}
    summary |= {
        "adapter_sha256": adapter_hash(run / "adapter"),
        "tasks": {"<b>boolq</b>": task, "piqa": task},
        "average": 0.625,
        "average_interval": [0.5, 0.75],
    }
    (run / "eval" / "likelihood.json").write_text(json.dumps(summary))
    return run


@pytest.fixture
def run_path(finished_run: Path, tmp_path: Path) -> Path:
    """A copy that one test may damage."""
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def comparison_path(tmp_path: Path, finished_run: Path, tiny_llama_dir: Path) -> Path:
    """A comparison's directory with made-up results, one arm with a hostile label; its one adapter is a real
    one."""
    from linchain_cli.recipe import load_recipe

    path = tmp_path / "comparison"
    shutil.copytree(finished_run, path / "arms" / "depth-3_seed-1")
    label = f"depth 3, target_modules {HOSTILE} $\\frac"
    estimate = {"mean": 0.5, "sd": 0.01, "n": 2}
    row = {
        "arm": "depth-3",
        "label": label,
        "reference": "LoRA",
        "depth": 3,
        "rank": 4,
        "alpha": 8.0,
        "learning_rate": 3e-4,
        "seeds": [1, 2],
        "trainable_parameters": 1234,
        "validation_loss": estimate,
        "area": estimate,
        "tokens_to_reference": {"mean": 150.0, "reached": 1, "of": 2},
        "step_seconds": estimate,
        "tokens_per_second": estimate,
        "peak_memory_bytes": 10**9,
        "accuracy": None,
        "difference": {
            "validation_loss": {
                "mean": -0.1,
                "sd": 0.1,
                "n": 2,
                "interval": [-0.3, 0.1],
                "verdict": "within the spread",
            },
            "area": {"mean": -0.1, "sd": 0.01, "n": 2, "interval": [-0.2, -0.05], "verdict": "lower"},
            "accuracy": None,
        },
    }
    lora = {
        **row,
        "arm": "depth-0",
        "label": "LoRA",
        "difference": dict.fromkeys(row["difference"], {"verdict": "reference"}),
    }
    runs = [
        {
            "arm": one["arm"],
            "label": one["label"],
            "seed": seed,
            "directory": f"arms/{one['arm']}_seed-{seed}",
            "status": "finished",
            "learning_rate": 3e-4,
            "depth": 3,
            "rank": 4,
            "validation_loss": 0.5,
            "area": 0.6,
            "step_seconds": 0.1,
            "tokens_per_second": 9.0,
            "accuracy": None,
            "accuracies": {},
            "training": [[step, 3 / step + seed] for step in range(1, 9)],
            "validation": [[step, 100.0 * step, 3 / step + seed] for step in (2, 4, 8)],
        }
        for one in (row, lora)
        for seed in (1, 2)
    ]
    results = {
        "format": 1,
        "name": "figure",
        "recipe": load_recipe(finished_run / "recipe.yaml").model_dump(mode="json"),
        "equal_parameters": False,
        "commands": [["adapter.depth=0,3", "--seeds", "1,2"]],
        "learning_rate": 3e-4,
        "hashes": {"data": "d" * 64, "base": "b" * 64},
        "tables": {"recipe_rate": [lora, row], "best_rate": [lora, row]},
        "accuracies": [],
        "runs": runs,
        "notes": [f"a note {HOSTILE}"],
    }
    (path / "comparison.json").write_text("{}")
    (path / "results.json").write_text(json.dumps(results))
    return path


# What a page consists of; anything else came out of the data.
ELEMENTS = {
    "html",
    "head",
    "meta",
    "title",
    "style",
    "body",
    "main",
    "section",
    "div",
    "figure",
    "figcaption",
    "img",
    "h1",
    "h2",
    "h3",
    "p",
    "ul",
    "li",
    "dl",
    "dt",
    "dd",
    "pre",
    "code",
    "mark",
    "table",
    "caption",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
}
_VOID = {"meta", "img", "br"}


@dataclass
class Page(HTMLParser):
    """Elements with their attributes, the text, and which elements were left open or closed wrongly."""

    source: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    marked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self):
        super().__init__()
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        self.problems += self._open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in _VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        if not self._open or self._open.pop() != name:
            self.problems.append(f"</{name}>")

    def handle_data(self, data):
        if "style" not in self._open:
            self.texts.append(data)
        if "mark" in self._open:
            self.marked.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for found, attributes in self.elements if found == name]


def _check_page(source: str) -> Page:
    """Well-formed, self-contained, scriptless, and every figure with its words."""
    page = Page(source)
    assert not page.problems
    assert {name for name, _ in page.elements} <= ELEMENTS
    attributes = [(key, value) for _, found in page.elements for key, value in found.items()]
    assert not [key for key, _ in attributes if key.startswith("on") or key in ("href", "action", "srcset")]
    for image in page.all("img"):
        assert image["src"].startswith("data:image/svg+xml;base64,")
        assert len(image["alt"]) > 20
    assert len(page.all("figure")) == len(page.all("figcaption")) == len(page.all("img"))
    policy = next(found["content"] for found in page.all("meta") if found.get("http-equiv"))
    assert "default-src 'none'" in policy and "script-src" not in policy
    assert not re.search(r"(https?:)?//(?!www\.w3\.org)", re.sub(r"<pre>.*?</pre>", "", source, flags=re.S))
    return page


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _overflow(source: str, width: int, directory: Path) -> tuple[int, list[str]]:
    """(width that the page takes, elements that reach beyond it), in a frame of `width` CSS pixels."""
    script = """
    addEventListener('load', () => {
      const page = document.getElementById('page').contentDocument, root = page.documentElement;
      page.querySelectorAll('details').forEach(one => one.open = true);
      const position = one => one && page.defaultView.getComputedStyle(one).position;
      const hidden = one => position(one.closest('thead')) == 'absolute';
      const reaches = one => one.getBoundingClientRect().right > root.clientWidth + .5;
      const holds = one => one.clientWidth > 0 && one.scrollWidth > one.clientWidth + 1;
      const wide = [...page.querySelectorAll('body *')]
        .filter(one => !hidden(one) && (reaches(one) || holds(one)));
      const found = [root.scrollWidth, ...wide.map(one => one.outerHTML.slice(0, 99))];
      document.getElementById('found').textContent = found.join('\\n');
    });
    """
    frame = directory / "frame.html"
    frame.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><iframe id="page"'
        f' style="border:0;width:{width}px;height:900px" srcdoc="{html.escape(source)}"></iframe>'
        f'<pre id="found"></pre><script>{script}</script>'
    )
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        " --disable-component-update --disable-sync --hide-scrollbars --dump-dom"
    ).split()
    command = [_chromium(), *options, f"--user-data-dir={directory / 'profile'}", frame.as_uri()]
    environment = {**os.environ, "HOME": str(directory)}
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment).stdout
    found = re.search(r'<pre id="found">(.*?)</pre>', shown, re.S)
    assert found, "the browser showed nothing"
    first, *elements = html.unescape(found[1]).splitlines()
    return int(first), [one for one in elements if one]


@pytest.fixture(scope="session")
def parse_page() -> type[Page]:
    return Page


@pytest.fixture(scope="session")
def check_page() -> Callable[[str], Page]:
    return _check_page


@pytest.fixture
def overflow(tmp_path: Path) -> Callable[[str, int], tuple[int, list[str]]]:
    """`overflow(page, width)`; tests that want it are skipped where there is no browser."""
    if _chromium() is None:
        pytest.skip("no Chromium is installed")
    return lambda source, width: _overflow(source, width, tmp_path)
