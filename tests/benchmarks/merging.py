"""Routed experts merged into those that stay, after REAM (arXiv 2604.04356), against removing them.

    python tests/benchmarks/merging.py TEXT HELD_OUT FOLDER

The mixture is that of experts.py. Experts that go join the one that stays and is most like them: the mean of
the cosine of their mean outputs, weighted by the router, and the likeness of their router logits. Channels
are brought into the same order by activations and weights; weights are averaged by REAP's score. Then what
stays is cut out, without repair and repaired towards the model before merging. Prints a Markdown table of the
perplexity per byte.

Unlike REAM's own code, every expert joins the nearest one, where that fills groups of up to 16 one after the
other, and all layers are merged by the dense model's inputs, not each by those of the merged ones before.
"""

from __future__ import annotations

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from experts import BLOCK, EXPERTS, train
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

import surgery
from surgery.engine.hooks import module_inputs
from surgery.plan.kind_plan import KindPlan
from surgery.repair.dense_reference import DenseReference


class Mixture:
    """One layer's experts on calibration tokens x [T, D]: activations and likeness; and REAP's `scores`."""

    def __init__(self, mlp: Any, x: torch.Tensor, scores: list[float]) -> None:
        self.scores = torch.tensor(scores).clamp_min(1e-6)
        self.up, self.down = mlp.experts.gate_up_proj, mlp.experts.down_proj
        logits = functional.linear(x, mlp.gate.weight)
        shares = logits.softmax(-1)
        pairs = [functional.linear(x, up).chunk(2, -1) for up in self.up]
        self.activations = [functional.silu(gate) * up for gate, up in pairs]
        outputs = [functional.linear(a, down) for a, down in zip(self.activations, self.down, strict=True)]
        means = torch.stack([(shares[:, [e]] * outputs[e]).mean(0) for e in range(EXPERTS)])
        cosine = (functional.cosine_similarity(means[:, None], means[None], dim=-1) + 1) / 2
        profile = functional.normalize(logits.T, dim=-1)
        apart = torch.cdist(profile, profile)
        self.likeness = (cosine + 1 - apart / apart.max()) / 2

    def in_order_of(self, one: int, other: int) -> torch.Tensor:
        """The channels of expert `other`, in the order of those of `one` that they are most like."""
        cost = torch.cdist(self._rows(self.activations[one].T), self._rows(self.activations[other].T))
        cost = cost + torch.cdist(self._rows(self._weights(one)), self._rows(self._weights(other)))
        return torch.tensor(linear_sum_assignment(cost.numpy())[1])

    def merged(self, into: int, others: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of expert `into` with `others`, averaged by score."""
        total = self.scores[[into, *others]].sum()
        up, down = self.up[into] * self.scores[into], self.down[into] * self.scores[into]
        for other in others:
            order = self.in_order_of(into, other)
            gate, linear = self.up[other].chunk(2)
            up = up + self.scores[other] * torch.cat([gate[order], linear[order]])
            down = down + self.scores[other] * self.down[other][:, order]
        return up / total, down / total

    def _weights(self, expert: int) -> torch.Tensor:
        return torch.cat([*self.up[expert].chunk(2), self.down[expert].T], 1)

    @staticmethod
    def _rows(values: torch.Tensor) -> torch.Tensor:
        return functional.normalize(values, dim=-1)


@torch.no_grad()
def merge(dense: Any, ids: torch.Tensor, cuts: KindPlan) -> Any:
    """A copy of a model whose experts that stay in `cuts` hold, merged, those that go."""
    inputs: dict[str, torch.Tensor] = {}
    layers = {str(number): layer.mlp for number, layer in enumerate(dense.model.layers)}
    with module_inputs(layers, inputs.__setitem__):
        dense(ids)
    result = copy.deepcopy(dense)
    for number, layer in enumerate(result.model.layers):
        name = str(number)
        facts = cuts.facts["layers"][name]
        mixture = Mixture(layers[name], inputs[name].flatten(0, -2), facts["reap"])
        groups: dict[int, list[int]] = {}
        for expert in set(range(EXPERTS)) - set(facts["kept"]):
            nearest = max(facts["kept"], key=lambda one: float(mixture.likeness[one, expert]))
            groups.setdefault(nearest, []).append(expert)
        for into, others in groups.items():
            up, down = mixture.merged(into, others)
            layer.mlp.experts.gate_up_proj[into], layer.mlp.experts.down_proj[into] = up, down
    return result


def main(text: str, held_out: str, folder: Path) -> None:
    """Merge, cut, measure."""
    source, merged_source = folder / "byte-mixtral-8", folder / "byte-mixtral-merged"
    if not source.exists():
        train(Path(text).read_text(encoding="utf-8"), source)
    model = surgery.open_model(source, dtype="float32")
    index = surgery.build_index(model, text=text, blocks=96, block_size=BLOCK)
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    run = DenseReference.run

    def before_merging(self: DenseReference, number: int, layer: nn.Module) -> None:
        merged = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        layer.load_state_dict(dense.model.layers[number].state_dict())
        run(self, number, layer)
        layer.load_state_dict(merged)

    print("| experts | chosen by | | without repair | repaired |\n|---|---|---|---|---|", flush=True)
    for keep in (6, 4):
        for score in ("reap", "lp"):
            cuts = surgery.plan_experts(model, index, keep, score)
            shutil.rmtree(merged_source, ignore_errors=True)
            shutil.copytree(source, merged_source)
            merge(dense, index.input_ids.long(), cuts).save_pretrained(merged_source)
            for what, where in (("removed", source), ("merged", merged_source)):
                found = []
                DenseReference.run = before_merging if what == "merged" else run
                opened = surgery.open_model(where, dtype="float32")
                for repair in ("none", "lstsq-acc"):
                    plan = surgery.plan_pruning(
                        opened, index, sparsity=0.0, multiple_of=8, cuts=(cuts,), repair=repair
                    )
                    cut = surgery.prune(opened, index, plan, folder / "byte-mixtral-cut", overwrite=True)
                    found.append(surgery.perplexity(cut, held_out, blocks=200, block_size=BLOCK).perplexity)
                print(
                    f"| {keep} of {EXPERTS} | {score} | {what} | {found[0]:.3f} | {found[1]:.3f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
