"""`make results`: index, compare, ablate, round and weigh up three real models, and write all tables.

    python examples/results.py OUT [--model NAME]

Models: SmolLM2-135M-Instruct, a byte-level Mixtral that is trained here in some minutes, and, with
`--model qwen2.5-coder-1.5b`, Qwen2.5-Coder-1.5B-Instruct (GGUF, 1.1 GB, from wheels; hours on two cores).
`--model` may be given several times. Every command is one a user types, and is printed; its folder below OUT
is kept, so that another run goes on. OUT/results.md has the tables, each under the command that made it.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from assets import fetch_coder, fetch_model, fetch_text
from second_architecture import train

import surgery
from surgery.markdown import markdown_table


@dataclass(frozen=True)
class Subject:
    """A model, how much text it is indexed and measured on, and what is compared."""

    name: str
    fetch: Callable[[Path], Path]
    calibration: str
    measured: str
    cuts: tuple[str, ...]
    sparsity: str = "0.5"
    rounding: str = "--group-size 64 --per-channel"
    extra: str = ""
    frontier: str = ""
    texts: tuple[str, ...] = ("wikipedia-held-out.txt", "web.txt")


def smollm2(folder: Path) -> Path:
    return fetch_model(folder / "SmolLM2-135M-Instruct", hub=False)


def byte_mixtral(folder: Path) -> Path:
    target = folder / "byte-mixtral"
    if not target.exists():
        partial = folder / "byte-mixtral.partial"
        train((folder / "wikipedia.txt").read_text(encoding="utf-8"), partial)
        partial.rename(target)
    return target


SCORES = ("scar-prot", "scar-lp", "lp-hybrid", "wanda", "magnitude", "random")
CUTS = (*SCORES, *(f"{name}:lstsq-acc" for name in SCORES[:4]), "lp-hybrid:lstsq-acc:global")
SUBJECTS = {
    one.name: one
    for one in (
        Subject(
            "smollm2-135m",
            smollm2,
            "--blocks 64",
            "--text-blocks 8",
            CUTS,
            frontier="--text-block-size 512 --sparsity 0.25 --sparsity 0.5 --round 8:64 --round 4:64",
        ),
        Subject(
            "byte-mixtral",
            byte_mixtral,
            "--blocks 256 --block-size 128",
            "--text-blocks 64",
            CUTS[:-1],
            rounding="",  # edits of a comparison can't round experts that transformers joins in memory
            extra="--multiple-of 8",
            frontier="--text-block-size 128 --sparsity 0.25 --sparsity 0.5 --round 8:16 --round 4:16 "
            "--multiple-of 16",
        ),
        Subject(
            "qwen2.5-coder-1.5b",
            fetch_coder,
            "--blocks 8",
            "--text-blocks 2",
            ("scar-prot", "lp-hybrid", "lp-hybrid:lstsq-acc"),
            "0.25",
            frontier="--text-block-size 512 --sparsity 0.25 --round 8:64 --round 4:64 --no-speed",
        ),
    )
}


class Results:
    """Runs commands once each and collects their tables."""

    def __init__(self, out: Path, assets: Path) -> None:
        self.out, self.assets = out, assets
        self.parts = [
            "# Results\n\nsurgeon "
            f"{surgery.__version__}, torch {torch.__version__} with {torch.get_num_threads()} threads on "
            f"{platform.machine()}."
        ]

    def run(self, title: str, folder: Path, command: str, table: Callable[[Path], str]) -> None:
        """Run `surgeon COMMAND --out FOLDER` unless its folder is complete, and add its table."""
        arguments = [*shlex.split(command), "--out", str(folder)]
        said = f"surgeon {command} --out {folder}"
        if not (folder.exists() and any(folder.glob("*.json"))):
            print(f"\n$ {said}", flush=True)
            subprocess.run([sys.executable, "-m", "surgery", *arguments], check=True)
        self.parts.append(f"## {title}\n\n`{said}`\n\n{table(folder).strip()}")
        (self.out / "results.md").write_text("\n\n".join(self.parts) + "\n", encoding="utf-8")

    def subject(self, one: Subject) -> Path:
        """All experiments on one model; returns the folder of its index."""
        model = one.fetch(self.assets)
        home = self.out / one.name
        home.mkdir(parents=True, exist_ok=True)
        index = home / "index"
        text = f"--calibration {self.assets / 'wikipedia.txt'} {one.calibration}"
        measure = " ".join(f"--text {self.assets / name}" for name in one.texts) + f" {one.measured}"
        first = f"--text {self.assets / one.texts[0]} {one.measured}"
        self.run(f"{one.name}: index", index, f"index {model} {text}", index_table)
        with_index = f"{model} --index {index}"
        cuts = " ".join(f"--cut {cut}" for cut in one.cuts)
        self.run(
            f"{one.name}: which score, and does protection help once there is repair",
            home / "compare",
            f"compare {with_index} {measure} --sparsity {one.sparsity} {cuts} {one.extra}",
            lambda folder: (folder / "compare.md").read_text(encoding="utf-8"),
        )
        self.run(
            f"{one.name}: without super weights, with the super activation put back, and by supernodes kept",
            home / "ablate",
            f"ablate {with_index} {first} --conditions {conditions(index)}",
            lambda folder: outcomes(folder / "ablation.json"),
        )
        if one.rounding:
            self.run(
                f"{one.name}: rounding around super weights",
                home / "quantize",
                f"quantize {with_index} {first} --compare {one.rounding} {text}",
                lambda folder: outcomes(folder / "quantization.json"),
            )
        self.run(
            f"{one.name}: whether to cut at all",
            home / "frontier",
            f"frontier {with_index} {measure} {one.frontier}",
            lambda folder: (folder / "frontier.md").read_text(encoding="utf-8"),
        )
        return index

    def atlas(self, indexes: list[Path]) -> None:
        """All models side by side; made anew, as it costs seconds."""
        folder = self.out / "atlas"
        shutil.rmtree(folder, ignore_errors=True)
        members = " ".join(map(str, indexes))
        self.run("All models", folder, f"atlas {members}", atlas_table)


def conditions(index: Path) -> str:
    """What to ablate: super weights and structures where the index has any, and the supernodes' hit rate."""
    found = json.loads((index / "index.json").read_text(encoding="utf-8"))
    kinds = ("super-weights" if found["super_weights"] else "", "structures" if found["structures"] else "")
    return ",".join([kind for kind in kinds if kind] + ["hit-rate"])


def index_table(folder: Path) -> str:
    """What an index cost, in one line."""
    found = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    calibration = found["calibration"]
    return (
        f"{found['source']['parameters'] / 1e6:,.1f} M parameters, {calibration['blocks']} x "
        f"{calibration['block_size']} tokens; perplexity on them {found['loss']['perplexity']:.4f}."
    )


def outcomes(file: Path) -> str:
    """The conditions of an ablation or a comparison of roundings as a Markdown table."""
    fields: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for row in fields["conditions"]:
        low, high = row["interval"]
        effect = f"{row['effect']:+.4f}" + ("" if low is None else f" [{low:+.4f}, {high:+.4f}]")
        cells = [row["condition"], f"{row['changed']:,}", f"{row['perplexity']:.6g}", f"{row['factor']:.4g}"]
        rows.append([*cells, effect, f"{row['kl']:.4f}"])
    table = markdown_table(("condition", "changed", "perplexity", "×", "nats/token [95%]", "KL"), rows)
    tokens = fields["conditions"][0]["tokens"]
    return f"{table}\n\n{tokens:,} predicted tokens of {fields['text']['name']}."


def atlas_table(folder: Path) -> str:
    """The tables of an atlas, a level deeper."""
    text = (folder / "atlas.md").read_text(encoding="utf-8")
    return "\n".join(f"#{line}" if line.startswith("#") else line for line in text.splitlines()[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", action="append", choices=list(SUBJECTS))
    parser.add_argument("--assets", type=Path, default=Path(".cache"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    fetch_text(given.assets)
    results = Results(given.out, given.assets)
    chosen = given.model or ["smollm2-135m", "byte-mixtral"]
    results.atlas([results.subject(SUBJECTS[name]) for name in chosen])
    print(f"\nTables in {given.out / 'results.md'}")


if __name__ == "__main__":
    main()
