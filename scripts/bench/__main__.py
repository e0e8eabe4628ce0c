"""`python -m scripts.bench NAME [OPTIONS]`: runs the benchmark of this name, or lists them."""

from __future__ import annotations

import importlib
import sys

from linchain_cli.errors import LinchainError

NAMES = ("train", "busy", "parts", "scaling", "start", "data", "merge", "eval", "shard")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in NAMES:
        print(__doc__)
        for each in NAMES:
            summary = importlib.import_module(f"scripts.bench.{each}").__doc__
            print(f"  {each:8} {' '.join(summary.split(chr(10) * 2)[0].split())}")
        sys.exit(2 if name.strip("-") not in ("", "h", "help") else 0)
    sys.argv[:2] = [f"python -m scripts.bench {name}"]
    try:
        importlib.import_module(f"scripts.bench.{name}").main()
    except LinchainError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
