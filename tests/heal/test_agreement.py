"""Streamed training against a plain loop over the whole model with autograd and torch.optim.AdamW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import CALIBRATION, opened
from torch.func import functional_call
from transformers import AutoModelForCausalLM

import surgery.loading  # noqa: F401 (layers of different width)
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.heal.distil_loss import DistilLoss, TopTokens, counted_tokens, distil
from surgery.heal.optimizer import learning_rate
from surgery.heal.targets import Teacher
from surgery.heal.train import Division, HeldOut, Schedule, Trainer
from surgery.heal.trainable import A, B, Trainables, TrainMode

STEPS, BATCH, SIZE, TOP, RATE = 3, 3, 16, 32, 5e-4
LOSS = DistilLoss(temperature=2.0, cross_entropy=0.25)


def plain_loss(
    student: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    """The loss of `distil_loss` on whole logits [N, T, V], with log-probabilities in half precision."""
    wide, dense = student[:, :-1] / LOSS.temperature, teacher[:, :-1] / LOSS.temperature
    log_p, places = dense.log_softmax(-1).topk(TOP)
    log_p = log_p.half().float()
    p_rest = (1 - log_p.exp().sum(-1)).clamp_min(0)
    log_q = wide.log_softmax(-1)
    others = torch.ones_like(wide, dtype=torch.bool).scatter(-1, places, False)
    log_rest = log_q.masked_fill(~others, -torch.inf).logsumexp(-1)
    kl = (log_p.exp() * (log_p - log_q.gather(-1, places))).sum(-1)
    kl = kl + p_rest * (p_rest.clamp_min(1e-30).log() - log_rest)
    plain = -student[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    share = LOSS.cross_entropy
    nats = LOSS.temperature**2 * (1 - share) * kl + share * plain
    return (nats * counted[:, 1:]).sum() / counted[:, 1:].sum().clamp_min(1)


def plain_loop(
    student: Any,
    teacher: Any,
    ids: torch.Tensor,
    path: str,
    masters: dict[str, torch.Tensor],
    counted: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Masters after STEPS plain steps from `masters`, and the losses; adapters are merged into weights."""
    trained = {key: master.clone().requires_grad_(True) for key, master in masters.items()}
    adam = torch.optim.AdamW(trained.values(), lr=RATE, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        part = slice(step * BATCH, (step + 1) * BATCH)
        batch = ids[part]
        weights = {}
        for key, master in trained.items():
            if key.endswith(A):
                name = key.removesuffix(A)
                added = trained[name + B] @ master
                module = student.get_submodule(f"{path}.{name}")
                added = added.T if type(module).__name__ == "Conv1D" else added
                weights[f"{path}.{name}.weight"] = module.weight.detach() + added
            elif not key.endswith(B):
                weights[f"{path}.{key}"] = master
        logits = functional_call(student, weights, (batch,), {"use_cache": False}).logits
        with torch.no_grad():
            dense = teacher(batch, use_cache=False).logits
        loss = plain_loss(logits, dense, batch, counted[part])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
        adam.param_groups[0]["lr"] = learning_rate(step, STEPS, RATE)
        adam.step()
        adam.zero_grad()
        losses.append(float(loss.detach()))
    return {key: master.detach() for key, master in trained.items()}, losses


@pytest.fixture
def pair(save_tiny: Callable[..., Path], surgeon: Callable[..., Any]) -> Callable[[str], tuple[Path, Path]]:
    """Folders of a student and its teacher, of one family or with widths by layer."""

    def make(kind: str) -> tuple[Path, Path]:
        teacher = save_tiny("llama" if kind == "per-layer" else kind, name="dense", seed=1)
        if kind != "per-layer":
            return save_tiny(kind, name="student"), teacher
        cut = ("--sparsity", "0.5", "--multiple-of", "4", "--allocation", "score", "--repair", "none")
        surgeon("prune", str(teacher), *cut, "--out", "student", *CALIBRATION)
        return teacher.parent / "student", teacher

    return make


@pytest.mark.parametrize("train", ["all", "norms", "lora:3"])
@pytest.mark.parametrize("kind", ["llama", "phi3", "mixtral", "gpt2", "per-layer"])
def test_streamed_steps_are_those_of_a_plain_loop(
    kind: str, train: str, pair: Callable[[str], tuple[Path, Path]]
) -> None:
    compare(*pair(kind), train, torch.ones(STEPS * BATCH, SIZE, dtype=torch.bool))


def test_the_loss_is_on_counted_tokens_alone(pair: Callable[[str], tuple[Path, Path]]) -> None:
    """Also where a block of a batch has none, and where a whole batch has none: its loss is 0."""
    counted = torch.rand(STEPS * BATCH, SIZE, generator=torch.Generator().manual_seed(6)) < 0.3
    counted[1] = False
    counted[BATCH : 2 * BATCH] = False
    losses = compare(*pair("llama"), "all", counted)
    assert losses[0] > 0 and losses[1] == 0 and losses[2] > 0


def test_shares_of_a_batch_add_up_to_its_loss_and_gradient(save_tiny: Callable[..., Path]) -> None:
    model = StreamedModel(opened(save_tiny("llama")))
    ids = torch.randint(0, 256, (4, SIZE), generator=torch.Generator().manual_seed(5))
    counted = ids % 3 == 0
    counted[3] = False
    targets = TopTokens(ids[:, 1:, None], torch.full((4, SIZE - 1, 1), -0.5))

    def run(part: slice, tokens: int) -> tuple[float, torch.Tensor]:
        stream = TokenStream(model, ids[part], micro_batch=2)
        for number, layer in model.stream_layers(range(len(model.layers))):
            stream.forward(number, layer)
        share = TopTokens(targets.ids[part], targets.log_p[part])
        loss = distil(stream, share, LOSS, counted[part], tokens)
        return loss, stream.last_hidden(slice(None))  # the gradient has taken the place of hidden states

    tokens = counted_tokens(counted)
    whole, shares = run(slice(0, 4), tokens), [run(slice(*part), tokens) for part in ((0, 2), (2, 3), (3, 4))]
    assert sum(loss for loss, _ in shares) == pytest.approx(whole[0], rel=1e-6)
    torch.testing.assert_close(torch.cat([gradient for _, gradient in shares]), whole[1])
    assert shares[2][0] == 0 and not shares[2][1].any()
    assert run(slice(3, 4), 0)[0] == 0


def compare(student: Path, teacher: Path, train: str, counted: torch.Tensor) -> list[float]:
    """Compare losses and masters after streamed steps with those of the plain loop; returns the losses."""
    ids = torch.randint(0, 256, (STEPS * BATCH, SIZE), generator=torch.Generator().manual_seed(5))
    model = StreamedModel(opened(student), keep_bytes=100_000)  # some layers stay, some are read again
    trainables = Trainables(model.meta_model, TrainMode.parse(train), 7, torch.device("cpu"))
    for key, master in trainables.masters.items():
        if key.endswith(B):  # from 0, the adapters' A would have no gradient in the first step
            master.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(key)))
    start = {key: master.clone() for key, master in trainables.masters.items()}
    source = Teacher(
        StreamedModel(opened(teacher)), top=TOP, temperature=LOSS.temperature, micro_batch=2, place="device"
    )

    def targets(blocks: torch.Tensor) -> TopTokens:
        return source.targets(ids[blocks])

    trainer = Trainer(
        model,
        trainables,
        ids,
        targets,
        held_out=HeldOut({"text": ids[:1]}),
        counted=counted,
        schedule=Schedule(torch.arange(len(ids)), BATCH),
        peak=RATE,
        loss=LOSS,
        division=Division(micro_batch=2, graph_bytes=200_000),
    )
    losses = [trainer.step(step) for step in range(STEPS)]
    wholes = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (student, teacher)]
    expected, plain = plain_loop(*wholes, ids, model.meta_model.layers_path, start, counted)
    torch.testing.assert_close(losses, plain, atol=1e-5, rtol=1e-5)
    for key, master in trainables.masters.items():
        if key.endswith("c_attn.bias"):
            # softmax does not see the keys' bias: its gradient is rounding alone, which AdamW scales up
            width = len(master) // 3
            master[width : 2 * width] = expected[key][width : 2 * width]
        torch.testing.assert_close(master, expected[key], atol=1e-5, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
    assert any(not torch.equal(master, start[key]) for key, master in trainables.masters.items())
    return losses
