"""The order of the folders: each imports only what stands before it, and no two files import each other in a
circle.
"""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import surgery

ROOT = Path(surgery.__file__).parent
ORDER = (
    *(
        "errors",
        "byte_units",
        "progress",
        "defaults",
        "registry",
        "chart",
        "markdown",
        "bootstrap",
        "text",
        "loading",
    ),
    *("checkpoint", "vocabulary", "model", "engine", "budget", "index", "plan", "cut", "card", "repair"),
    *("pruning", "quantize", "evaluate", "search", "heal", "adapt", "export", "bench", "report"),
    *("frontier", "cli"),
)


def imports() -> dict[str, set[str]]:
    """Module -> modules of surgery that it imports anywhere, in functions and for type checkers too."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.rglob("*.py")}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "surgery":
                base = (node.module or "").removeprefix("surgery").removeprefix(".")
                for alias in node.names:
                    inner = f"{base}.{alias.name}".removeprefix(".")
                    found[module] |= {name for name in (inner, base) if name in modules}
    return found


def test_every_folder_imports_only_those_before_it() -> None:
    rank = {name: place for place, name in enumerate(ORDER)}
    against = [
        f"{module} imports {other}"
        for module, others in imports().items()
        for other in others
        if module not in ("__init__", "__main__")
        if rank[other.partition(".")[0]] > rank[module.partition(".")[0]]
    ]
    assert against == []


def test_no_circles() -> None:
    graph = {module: others for module, others in imports().items() if module != "__init__"}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError, naming the circle
