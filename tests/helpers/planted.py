"""Tiny models with a planted truth about super weights, and text that the planted model itself predicts.

Two hidden dimensions are reserved: no layer writes to them but what is planted. Every embedding has the same
large entry at TRIGGER, which planted channels read. What they write to ROW fills the final norm, so that the
head's column ROW decides what the model predicts: a model that lost the spike predicts something else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from helpers.tiny_models import opened
from surgery.engine.streamed_model import StreamedModel
from surgery.index.calibration import Calibration
from surgery.index.found_structures import FoundStructures, find_structures
from surgery.progress import no_progress
from surgery.text import TokenBlocks

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma"]
TRIGGER, ROW = 16, 17  # reserved hidden dimensions
RESERVED = [TRIGGER, ROW]


class Planted:
    """A tiny model to plant spikes in. `spike` adds channels; `save` writes the checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(1)
            head = self.model.get_output_embeddings().weight
            head[:, ROW] = 0.1 * torch.randn(len(head), generator=generator)
            embedding = self.model.get_input_embeddings().weight
            if embedding is not head:
                embedding[:, ROW] = 0
            embedding[:, TRIGGER] = 300.0
            norm, offset = self.model.model.norm, 1.0 if "gemma" in self.model.config.model_type else 0.0
            norm.weight.fill_(4.0 - offset)
            norm.weight[TRIGGER] = -offset  # predictions do not read it
            for layer in self.model.model.layers:
                layer.self_attn.o_proj.weight[RESERVED] = 0
                layer.mlp.down_proj.weight[RESERVED] = 0

    def mlp(self, layer: int) -> Any:
        return self.model.model.layers[layer].mlp

    @torch.no_grad()
    def channel(self, layer: int, column: int, reads: int = TRIGGER) -> None:
        """A channel of `layer` that fires where dimension `reads` is set, and is silent elsewhere."""
        mlp = self.mlp(layer)
        for projection in (mlp.gate_proj, mlp.up_proj):
            projection.weight[column] = 0
            projection.weight[column, reads] = 1.0
        mlp.down_proj.weight[:, column] = 0

    @torch.no_grad()
    def write(self, layer: int, row: int, column: int, value: float) -> None:
        self.mlp(layer).down_proj.weight[row, column] = value

    @torch.no_grad()
    def sample(self, blocks: int = 6, size: int = 40) -> torch.Tensor:
        """Token ids [blocks, size] drawn from the model: nothing predicts them better on average."""
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(0, 256, (blocks, 1), generator=generator)
        self.model.eval()
        while ids.shape[1] < size:
            logits = self.model(ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
        return ids.int()

    def calibration(self, blocks: int = 6) -> Calibration:
        """Text that the planted model wrote itself, and the start of two blocks as prompts."""
        drawn = self.sample(blocks)
        return Calibration(TokenBlocks(drawn, "own", 0, 1), [drawn[0, :12].long(), drawn[1, :9].long()])

    def found(self) -> FoundStructures:
        """What is found in the planted model, on text it wrote itself."""
        self.model.save_pretrained(self.folder)
        model = opened(self.folder)
        with torch.no_grad():
            return find_structures(model, StreamedModel(model), self.calibration(), None, no_progress)
