"""The published form of an index: `index.safetensors` with 16-bit codes of what plans are made from.

Per channel it takes 20 bytes where the form of `surgeon index` takes 56. Statistics that no plan needs
(LEFT_OUT) are not in it; redundancies (HALO_ONLY) are stored for the channels of the halo, the only ones a
plan reads. Tensors are ordered by statistic, so that one byte range holds a statistic of all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from surgery.checkpoint.safetensors_header import TensorEntry, make_header, read_header
from surgery.checkpoint.source import ByteSource
from surgery.index.codes import decode, encode
from surgery.index.ffn_index import HALO_ONLY, LEFT_OUT, FfnIndex, as_planned

RANGE, HALO = "range", "halo"  # last words of the tensors beside the codes


def left_out(names: Iterable[str]) -> tuple[str, ...]:
    """Statistics that a file with these tensors leaves out: those of the published form, or none."""
    return LEFT_OUT if any(_statistic(name) == RANGE for name in names) else ()


def coded_tensors(stem: str, ffns: list[FfnIndex], *, stacked: bool) -> dict[str, torch.Tensor]:
    """Codes, ranges and halo of the FFNs stored under `stem`: of one FFN [F], of routed experts [E, F].

    Halo channels of experts are indices into the flattened [E, F], as their supernodes are.
    """
    planned = [as_planned(ffn) for ffn in ffns]
    halos = [ffn.halo for ffn in planned]
    found = {
        stem + HALO: torch.cat([h + n * ffns[0].width for n, h in enumerate(halos)]).int(),
    }
    for name in ffns[0].statistics:
        if name in LEFT_OUT:
            continue
        rows = [ffn.statistics[name] for ffn in planned]
        if name in HALO_ONLY:
            rows = [row[members] for row, members in zip(rows, halos, strict=True)]
        codes, ranges = zip(*(encode(row) for row in rows), strict=True)
        joined = torch.cat(codes) if name in HALO_ONLY or not stacked else torch.stack(codes)
        found[stem + name] = joined
        found[f"{stem}{name}.{RANGE}"] = torch.stack(ranges) if stacked else ranges[0]
    return found


def save_by_statistic(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write a safetensors file: wide dtypes first, then by the last word of the names, then as given.

    The safetensors package orders by name, which spreads a statistic over the file.
    """
    order = {name: number for number, name in enumerate(tensors)}
    names = sorted(tensors, key=lambda n: (-tensors[n].element_size(), _statistic(n), order[n]))
    start, _, _ = make_header((name, tensors[name].dtype, tensors[name].shape) for name in names)
    with path.open("wb") as file:
        file.write(start)
        for name in names:
            file.write(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())


class StoredTensors(Mapping[str, torch.Tensor]):
    """The tensors of an index file by name, read when they are asked for; codes are decoded to float32.

    With a tensor, all tensors of the same statistic are read, adjacent ones by one byte range. Raises
    CheckpointError and HubError.
    """

    def __init__(self, source: ByteSource, file: str) -> None:
        self.source = source
        self.entries = read_header(source, file)
        self._stored: dict[str, torch.Tensor] = {}
        self._decoded: dict[str, torch.Tensor] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, name: str) -> torch.Tensor:
        coded = f"{name}.{RANGE}"
        if coded not in self.entries:
            return self.stored(name)
        if name not in self._decoded:
            self._decoded[name] = decode(self.stored(name), self.stored(coded))
        return self._decoded[name]

    def of_halo(self, stem: str, name: str, width: int, expert: int | None) -> torch.Tensor:
        """A statistic [F] that is stored for halo channels; NaN for the others."""
        members, codes = self.stored(stem + HALO).long(), self.stored(stem + name)
        ranges = self.stored(f"{stem}{name}.{RANGE}")
        if expert is not None:
            mine = (members // width == expert).nonzero().flatten()
            members, codes, ranges = members[mine] % width, codes.view(torch.int16)[mine], ranges[expert]
        values = torch.full((width,), math.nan)
        values[members] = decode(codes.view(torch.uint16), ranges)
        return values

    def stored(self, name: str) -> torch.Tensor:
        """The tensor in its stored dtype. Raises KeyError."""
        if name not in self._stored:
            entry = self.entries[name]
            same = [
                other
                for other in self.entries.values()
                if (_statistic(other.name), other.dtype) == (_statistic(name), entry.dtype)
            ]
            for run in _adjacent(same):
                self._read_run(run)
        return self._stored[name]

    def read_all(self) -> None:
        """Read every tensor now, so that the file may change or go away."""
        for run in _adjacent(self.entries.values()):
            self._read_run(run)

    def _read_run(self, run: list[TensorEntry]) -> None:
        start, stop = run[0].start, run[-1].stop
        if start == stop:
            buffer = torch.empty(0, dtype=torch.uint8)
        else:
            buffer = torch.frombuffer(self.source.read(run[0].file, start, stop), dtype=torch.uint8)
        for entry in run:
            piece = buffer[entry.start - start : entry.stop - start]
            self._stored[entry.name] = piece.clone().view(entry.dtype).view(entry.shape)


def _statistic(name: str) -> str:
    """The last word of a tensor's name, which says what it holds of a layer."""
    return name.rpartition(".")[2]


def _adjacent(entries: Iterable[TensorEntry]) -> list[list[TensorEntry]]:
    """Entries in runs without a gap, in the order of their bytes."""
    runs: list[list[TensorEntry]] = []
    for entry in sorted(entries, key=lambda e: (e.start, e.stop)):
        if runs and runs[-1][-1].stop == entry.start:
            runs[-1].append(entry)
        else:
            runs.append([entry])
    return runs
