"""Seconds of a streamed step of `surgeon heal` beside one of a plain in-memory loop, in turn in one process.

    python tests/benchmarks/healing.py STUDENT TEACHER [--train lora:16] [--blocks 8] [--rounds 3]

Both compute in the student's dtype on the same blocks, in the same micro-batches; both run the teacher in
every step. The plain loop is transformers with autograd, whole logits and torch.optim.AdamW.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from surgery.engine.open_model import Model, open_model
from surgery.engine.streamed_model import StreamedModel
from surgery.heal.targets import TOP, Teacher
from surgery.heal.train import Division, HeldOut, Schedule, Trainer
from surgery.heal.trainable import A, B, Trainables, TrainMode, adapter_hook

MICRO_BATCH, SIZE = 4, 512


class PlainLoop:
    """Student and teacher in memory, trained as `surgeon heal` does but with nothing streamed."""

    def __init__(self, student: Path, teacher: Path, trainables: Trainables, path: str, dtype: Any) -> None:
        self.student, self.teacher = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
            for folder in (student, teacher)
        )
        self.leaves: dict[str, torch.Tensor] = {}
        layers = self.student.get_submodule(path)
        for key, master in trainables.masters.items():
            if key.endswith((A, B)):
                self.leaves[key] = master.to(dtype).requires_grad_(True)
            else:
                self.leaves[key] = layers.get_parameter(key).requires_grad_(True)
        for key in [key.removesuffix(A) for key in self.leaves if key.endswith(A)]:
            hook = adapter_hook(self.leaves[key + A], self.leaves[key + B], 1.0)
            layers.get_submodule(key).register_forward_hook(hook)
        self.masters = {key: leaf.detach().float().clone() for key, leaf in self.leaves.items()}
        self.adam = torch.optim.AdamW(self.masters.values(), lr=1e-4, weight_decay=0.0)

    def step(self, ids: torch.Tensor) -> None:
        """Forward, backward and update on blocks of ids [N, T]."""
        for part in ids.split(MICRO_BATCH):
            with torch.no_grad():
                log_p = self.teacher(part, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            log_q = self.student(part, use_cache=False).logits[:, :-1].float().log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum() / ids[:, 1:].numel()
            loss.backward()
        for key, leaf in self.leaves.items():
            assert leaf.grad is not None
            self.masters[key].grad = leaf.grad.float()
            leaf.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters.values(), 1.0)
        self.adam.step()
        with torch.no_grad():
            for key, leaf in self.leaves.items():
                leaf.copy_(self.masters[key])


def trainer_of(student: Model, teacher: Model, train: str, ids: torch.Tensor) -> Trainer:
    """A trainer with all layers of both models in memory."""
    source = Teacher(
        StreamedModel(teacher, keep_bytes=1 << 40),
        top=TOP,
        temperature=1.0,
        micro_batch=MICRO_BATCH,
        place="device",
    )
    model = StreamedModel(student, keep_bytes=1 << 40)
    return Trainer(
        model,
        Trainables(model.meta_model, TrainMode.parse(train), 0, model.device),
        ids,
        lambda blocks: source.targets(ids[blocks]),
        held_out=HeldOut({"": ids[:1]}),
        schedule=Schedule(torch.arange(len(ids)), len(ids)),
        peak=1e-4,
        division=Division(MICRO_BATCH, graph_bytes=8 << 30),
    )


def main() -> None:
    """Print seconds of both and the ratio of their rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("student", type=Path)
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--train", default="lora:16")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    student, teacher = open_model(given.student), open_model(given.teacher)
    vocabulary = int(student.meta_model.config.get_text_config().vocab_size)
    ids = torch.randint(0, vocabulary, (given.blocks, SIZE), generator=torch.Generator().manual_seed(0))
    trainer = trainer_of(student, teacher, given.train, ids)
    path = trainer.model.meta_model.layers_path
    plain = PlainLoop(given.student, given.teacher, trainer.trainables, path, student.run.dtype)
    ratios = []
    for number in range(given.rounds + 1):
        started = time.perf_counter()
        plain.step(ids)
        between = time.perf_counter()
        trainer.step(0)
        ended = time.perf_counter()
        warm = " (warm-up)" if number == 0 else ""
        print(f"plain {between - started:.2f} s, streamed {ended - between:.2f} s{warm}", flush=True)
        ratios += [(between - started) / (ended - between)] if number else []
    print(f"rate of streamed / plain: {sorted(ratios)[len(ratios) // 2]:.2f} of {ids.numel()} tokens a step")


if __name__ == "__main__":
    main()
