"""The process that runs the library auto-round: `python -m surgery.quantize.autoround_job JOB.json`.

JOB.json is written by `surgery.quantize.autoround`. The packed model goes to the job's folder `out`; the
message of a failure goes to its file `error`.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any


def run(job: dict[str, Any]) -> None:
    """Round the model of a job and save it packed."""
    import torch
    from auto_round import AutoRound
    from safetensors.torch import load_file
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # Loaded here and not by the library, which would run the code of a checkpoint.
    safe: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto", use_safetensors=True, **safe)
    tokenizer = AutoTokenizer.from_pretrained(job["model"], **safe)
    ids = load_file(job["ids"])["ids"].long()
    samples: Any = [{"input_ids": block, "attention_mask": torch.ones_like(block)} for block in ids]
    whole = {"bits": 16, "data_type": "float"}
    library = AutoRound(
        model,
        tokenizer,
        scheme=job["scheme"],
        scale_dtype=job["scale_dtype"],
        layer_config=dict.fromkeys(job["ignored"], whole),
        dataset=DataLoader(samples, batch_size=job["batch"]),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=job["batch"],
        iters=job["steps"],
        seed=job["seed"],
        device_map=job["device"],
        enable_torch_compile=False,
        trust_remote_code=False,
    )
    library.quantize_and_save(output_dir=job["out"], format="llm_compressor")


def end_with_parent() -> None:
    """End this process when its stdin ends, as it does when the parent is gone."""
    while os.read(0, 1):  # not sys.stdin, whose lock Python wants when it ends
        pass
    os._exit(1)


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        run(job)
    except (Exception, SystemExit) as error:  # whatever the library raises is told by the parent
        told = " ".join(f"{type(error).__name__}: {error}".split())
        Path(job["error"]).write_text(told, encoding="utf-8")
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
