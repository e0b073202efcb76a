"""The teacher's targets: its most likely next tokens of every training block, from streamed forward passes.

They are computed once and kept in two files of the journal, or anew for every batch.
Shape letters: N blocks, T tokens of a block, k tokens kept of a position.
"""

from __future__ import annotations

from typing import Any

import torch

from surgery.budget.heal_cost import TARGET_CHUNK
from surgery.engine.hidden_store import HiddenStore
from surgery.engine.loss import head_slices
from surgery.engine.resume import Journal
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.heal.distil_loss import TopTokens, top_tokens
from surgery.progress import Progress, no_progress

TOP = 64  # tokens kept of a position
BYTES_PER_TOKEN = 6  # an id and a log-probability in half precision
FILES = ("target-ids.bin", "target-logs.bin")


def target_bytes(blocks: int, block_size: int, top: int) -> int:
    """Bytes of the files that hold the targets of N blocks."""
    return blocks * (block_size - 1) * top * BYTES_PER_TOKEN


class Teacher:
    """The dense model as a source of targets, at a temperature.

    `rows` [V], where the student has other rows of the vocabulary, are the teacher's ids of them, -1 for none
    (`shared_tokens`). The teacher then reads the student's tokens, and its distribution is the one over these
    tokens alone: what it gives to others is shared out in proportion.
    """

    def __init__(
        self,
        model: StreamedModel,
        *,
        top: int,
        temperature: float,
        micro_batch: int,
        place: str,
        rows: torch.Tensor | None = None,
    ) -> None:
        self.model = model
        known = (
            int(model.model.config.get_text_config().vocab_size) if rows is None else int((rows >= 0).sum())
        )
        self.top = min(top, known)
        self.temperature = temperature
        self.micro_batch = micro_batch
        self.place = place
        self.rows = rows

    @torch.no_grad()
    def targets(self, ids: torch.Tensor) -> TopTokens:
        """Targets [N, T - 1, k] of blocks of token ids [N, T], the student's; on the CPU, from one pass."""
        model = self.model
        ids = ids if self.rows is None else self.rows[ids]
        stream = TokenStream(model, ids, micro_batch=self.micro_batch, place=self.place)
        for number, layer in model.stream_layers(range(len(model.layers))):
            stream.forward(number, layer)
        shape = (len(ids), ids.shape[1] - 1, self.top)
        found = TopTokens(torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.half))
        with model.other_weights():
            for block in range(len(ids)):
                hidden = stream.last_hidden(slice(block, block + 1))[0]
                for rows in head_slices(model, shape[1]):
                    best = top_tokens(self._logits(hidden[rows]), self.top, self.temperature)
                    found.ids[block, rows], found.log_p[block, rows] = best.ids.cpu(), best.log_p.cpu()
                model.malloc.trim()
        return found

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 logits [n, V] of the student's tokens, from the last hidden states [n, D]."""
        logits = self.model.logits(hidden).float()
        if self.rows is None:
            return logits
        rows = self.rows.to(logits.device)
        return logits[:, rows.clamp_min(0)].masked_fill_(rows < 0, -torch.inf)


class StoredTargets:
    """Targets of the blocks with the numbers `blocks` [N], rising, in files of a journal; `fill` computes
    those that are missing.
    """

    def __init__(self, journal: Journal, blocks: torch.Tensor, block_size: int, top: int) -> None:
        self.journal = journal
        shape, cpu = (1, len(blocks), block_size - 1, top), torch.device("cpu")
        ids, logs = (journal.path(file) for file in FILES)
        self.ids = HiddenStore(shape, torch.int32, cpu, path=ids)
        self.logs = HiddenStore(shape, torch.float16, cpu, path=logs)
        self.blocks = blocks

    def fill(self, teacher: Teacher, ids: torch.Tensor, progress: Progress[Any] = no_progress) -> None:
        """Compute the missing targets, a chunk of blocks at a time; `ids` are those of all blocks."""
        starts = range(0, len(self.blocks), TARGET_CHUNK)
        for start in progress(starts, "targets", len(starts)):
            if f"targets {start}" in self.journal:
                continue
            part = slice(start, min(start + TARGET_CHUNK, len(self.blocks)))
            found = teacher.targets(ids[self.blocks[part]])
            self.ids.put(0, part, found.ids)
            self.logs.put(0, part, found.log_p)
            self.journal.mark(f"targets {start}")

    def take(self, blocks: torch.Tensor) -> TopTokens:
        """Targets [n, T - 1, k] of the blocks with these numbers."""
        places = torch.searchsorted(self.blocks, blocks).tolist()
        parts = [slice(place, place + 1) for place in places]
        cpu = torch.device("cpu")
        ids = torch.cat([self.ids.get(0, part, cpu) for part in parts])
        return TopTokens(ids, torch.cat([self.logs.get(0, part, cpu) for part in parts]))
