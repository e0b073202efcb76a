"""`make demo`: index, prune and measure a real model with a user's commands, then let it write."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from assets import fetch

PROMPT = "The capital of France is"


def run(command: str) -> None:
    """Print a command and run it."""
    print(f"\n$ {command}", flush=True)
    arguments = shlex.split(command)
    surgeon = Path(sys.executable).with_name("surgeon")
    subprocess.run([str(surgeon) if a == "surgeon" else a for a in arguments], check=True)


def generate(model: str) -> None:
    """Print a checkpoint's continuation of a prompt, loaded with AutoModelForCausalLM."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    causal_lm = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = causal_lm.generate(**inputs, max_new_tokens=24, do_sample=False)
    print(f"\n{model} writes:\n{tokenizer.decode(output[0])}")


def main() -> None:
    """Run the demo in the folder `demo/`; what is already there is used again."""
    started = time.monotonic()
    Path("demo").mkdir(exist_ok=True)
    model, _, _ = fetch(Path(".cache"), hub=True)
    os.chdir("demo")
    for name in (model.name, "wikipedia.txt", "wikipedia-held-out.txt"):
        link = Path(name)
        if not link.is_symlink():
            link.symlink_to(Path("..") / ".cache" / name)
    if not Path("smollm2-index").exists():
        run(f"surgeon index {model.name} --calibration wikipedia.txt --out smollm2-index")
    run("surgeon show smollm2-index")
    run(f"surgeon prune {model.name} --index smollm2-index --sparsity 0.25 --out smollm2-25 --overwrite")
    for folder in (model.name, "smollm2-25"):
        run(f"surgeon eval {folder} --text wikipedia-held-out.txt --blocks 8")
    runtimes = "--runtime transformers --runtime llama.cpp --batch 1"
    run(f"surgeon bench smollm2-25 --against {model.name} {runtimes}")
    for folder in (model.name, "smollm2-25"):
        generate(folder)
    run("surgeon report smollm2-25 --index smollm2-index --out smollm2-25.html --overwrite")
    print(f"\nDone in {time.monotonic() - started:.0f} s; everything is in demo/")


if __name__ == "__main__":
    main()
