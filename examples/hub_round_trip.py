"""From Hub to Hub on this machine: publish a tiny model on a loopback Hub, shrink it from there, load the
result back.

    python examples/hub_round_trip.py

The Hub is the small server of the tests (`tests/helpers/loopback_hub.py`); the clients are the real ones.
With HF_TOKEN set and without HF_ENDPOINT the same `surgeon` command works against the real Hub.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/tiny-half")
print("A stranger loads it: intermediate_size", model.config.intermediate_size)
"""


def main() -> None:
    """Run the round trip and print what happens."""
    from helpers.loopback_hub import TOKEN, serving
    from helpers.tiny_models import byte_tokenizer, tiny_model

    with tempfile.TemporaryDirectory() as scratch, serving() as hub:
        folder = Path(scratch)
        tiny_model("llama").save_pretrained(folder / "tiny")
        byte_tokenizer().save_pretrained(folder / "tiny")
        hub.put("org/tiny", {p.name: p.read_bytes() for p in (folder / "tiny").iterdir()})
        (folder / "text.txt").write_text((ROOT / "LICENSE").read_text())
        known = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        environment = {**os.environ, **known, "HF_HOME": str(folder / "home")}
        command = (
            "prune org/tiny --range-reads --sparsity 0.5 --multiple-of 8 --calibration text.txt --blocks 4"
        )
        command += " --block-size 32 --out tiny-half --eval text.txt --eval-blocks 4 --push me/tiny-half"
        print("$ surgeon", command, flush=True)
        run = {"cwd": folder, "env": environment, "check": True}
        subprocess.run([sys.executable, "-m", "surgery", *command.split()], **run)  # type: ignore[call-overload]
        print("Published:", ", ".join(sorted(hub.files("me/tiny-half"))), flush=True)
        subprocess.run([sys.executable, "-c", LOAD], **run)  # type: ignore[call-overload]


if __name__ == "__main__":
    main()
