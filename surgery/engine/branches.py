"""Runs many edited models beside the dense one, in one pass over the layers.

A condition is a set of edits by layer. All conditions share the resident layer's weights, and conditions
share hidden states for as long as their edits are the same: a branch forks from the dense stream, or from
another branch, in the first layer in which its edits differ. Conditions with the same edits stay one branch
to the end.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.engine.hooks import preserved
from surgery.engine.layer_edits import Dense, Edit, Edits, edit_key, run_dense, written_outputs
from surgery.engine.streamed_model import StreamedModel
from surgery.engine.token_stream import TokenStream
from surgery.progress import Progress, no_progress


@dataclass
class _Branch:
    """Conditions (by position) whose edits so far are the same, and their hidden states."""

    members: list[int]
    stream: TokenStream


class Branches:
    """Conditions that run beside the stream `dense`, of which all start as copies.

    `conditions` are edits by layer. `place` is where the branches' hidden states are stored, as for
    `HiddenStore`. Call `forward` with each resident layer in order; `changed` counts, for each condition,
    what its edits changed.
    """

    def __init__(self, model: StreamedModel, dense: TokenStream, conditions: list[Edits], place: str) -> None:
        self.model, self.dense, self.conditions, self.place = model, dense, conditions, place
        self.changed = [0 for _ in conditions]
        self.branches = [_Branch(list(range(len(conditions))), dense)] if conditions else []

    def streams(self) -> list[TokenStream]:
        """The stream of every condition; `dense` where nothing was edited, one stream where edits agree."""
        found = {member: branch.stream for branch in self.branches for member in branch.members}
        return [found[i] for i in range(len(self.conditions))]

    def forward(self, number: int, layer: nn.Module) -> None:
        """Run the dense stream and every branch through the resident layer `number`."""
        edited = self._fork(number)
        every = [edit for condition in self.conditions for edit in condition.get(number, [])]
        size = self.dense.ids.shape[1]
        dense = run_dense(lambda: self.dense.forward(number, layer), self.model.ffns(number), every, size)
        for branch, edits in edited:
            if branch.stream is not self.dense:
                self._run(branch, edits, number, layer, dense)

    def _fork(self, number: int) -> list[tuple[_Branch, list[Edit]]]:
        """Split the branches by their edits in layer `number`; returns each with its edits there."""
        found: list[tuple[_Branch, list[Edit]]] = []
        for branch in self.branches:
            groups: dict[Hashable, list[int]] = {}
            for member in branch.members:
                edits = self.conditions[member].get(number, [])
                groups.setdefault(tuple(map(edit_key, edits)), []).append(member)
            unedited = branch.stream if () in groups or branch.stream is self.dense else None
            for key, members in groups.items():
                stream = branch.stream
                takes_over = unedited is None and members is list(groups.values())[-1]
                if key and not takes_over:
                    stream = branch.stream.fork(len(self.dense.ids), number, self.place)
                found.append((_Branch(members, stream), self.conditions[members[0]].get(number, [])))
        self.branches = [branch for branch, _ in found]
        return found

    def _run(self, branch: _Branch, edits: list[Edit], number: int, layer: nn.Module, dense: Dense) -> None:
        """Run one branch through the layer, changed by `edits` and then restored."""
        if not edits:
            branch.stream.forward(number, layer)
            return
        ffns = self.model.ffns(number)
        with preserved(layer), written_outputs(ffns, edits, dense, self.dense.ids.shape[1]):
            count = sum(edit.apply(ffns, layer) for edit in edits)
            branch.stream.forward(number, layer)
        for member in branch.members:
            self.changed[member] += count


def run_branches(
    model: StreamedModel,
    dense: TokenStream,
    conditions: list[Edits],
    place: str,
    progress: Progress[Any] = no_progress,
    label: str = "layers",
) -> Branches:
    """Run `dense` and all conditions through every layer of the model."""
    branches = Branches(model, dense, conditions, place)
    count = len(model.layers)
    for number, layer in progress(model.stream_layers(range(count)), label, count):
        branches.forward(number, layer)
    return branches
