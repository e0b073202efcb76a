"""Speed of reading GGUF tensors: MB/s of bfloat16 made, and the ratio to the gguf package's dequantising.

    python tests/benchmarks/gguf_blocks.py [THREADS] [TYPE …]

A file with one tensor of random blocks, in the system's cache; the best of five runs of either, taken in
turns. The gguf package has one thread.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from surgery.checkpoint.gguf_blocks import BLOCK_TYPES
from surgery.checkpoint.gguf_file import GgufFile

ROWS, COLUMNS = 4096, 4096


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(kind: str, folder: Path) -> tuple[float, float]:
    """(surgeon's, gguf's) MB/s of bfloat16 for one type."""
    block, stored = BLOCK_TYPES[kind], gguf.GGMLQuantizationType[kind]
    shape = (ROWS, COLUMNS // block.weights * block.nbytes)
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    writer = gguf.GGUFWriter(folder / kind, "llama")
    writer.add_tensor("w", raw, raw_shape=shape, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = GgufFile(folder / kind)
    ours, theirs = [], []
    for _ in range(5):
        ours.append(seconds(lambda: file.read(file.tensors["w"], torch.bfloat16)))
        theirs.append(seconds(lambda: torch.from_numpy(gguf.dequantize(raw, stored)).to(torch.bfloat16)))
    (folder / kind).unlink()
    megabytes = ROWS * COLUMNS * 2 / 1e6
    return megabytes / min(ours), megabytes / min(theirs)


if __name__ == "__main__":
    arguments = sys.argv[1:]
    torch.set_num_threads(int(arguments.pop(0)) if arguments and arguments[0].isdigit() else 2)
    warnings.simplefilter("ignore")
    print(f"{torch.get_num_threads()} threads, MB/s of bfloat16")
    with tempfile.TemporaryDirectory() as folder:
        for kind in arguments or BLOCK_TYPES:
            if kind in gguf.GGMLQuantizationType.__members__ and BLOCK_TYPES[kind].number is None:
                ours, theirs = measure(kind, Path(folder))
                print(f"{kind:8} {ours:6.0f}   gguf {theirs:5.0f}   ratio {ours / theirs:5.1f}", flush=True)
