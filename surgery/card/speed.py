"""The section about speed on a card, from the entry `bench` of surgeon.json."""

from __future__ import annotations

from typing import Any

from surgery.byte_units import format_bytes


def speed_section(manifest: dict[str, Any]) -> str:
    """Markdown with one row for each model, runtime and batch size; empty where nothing was measured."""
    found = manifest.get("bench")
    rows = speed_rows(found) if found else []
    if not found or not rows:
        return ""
    settings, machine = found["settings"], found["machine"]
    where = machine["accelerator"] or machine["processor"]
    count = 0 if machine["accelerator"] else settings["threads"]
    threads = f", {count} thread{'s' * (count > 1)}" if count else ""
    sizes = f"prompts of {settings['prompt_tokens']} tokens, {settings['new_tokens']} new ones"
    versions = {k: v for one in found["results"] for k, v in one.get("versions", {}).items()}
    lines = [
        "## Speed",
        "",
        f"On {where}{threads}: {sizes}, medians of {settings['repeats']} runs (smallest to largest); "
        "memory is the process's peak, libraries included.",
        "",
        "| model | runtime | batch | load | memory | prefill, tokens/s | decode, tokens/s |",
        "|---|---|---|---|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Versions: " + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())) + ".",
    ]
    return "\n".join(lines)


def speed_rows(found: dict[str, Any]) -> list[list[str]]:
    """One row of text for each model, runtime and batch size that was measured."""
    rows = []
    for one in found["results"]:
        label = one["runtime"] + (f", {one['type']}" if one["type"] else "")
        memory = one.get("device_bytes") or one.get("peak_bytes") or 0
        for batch in one.get("batches", []):
            speeds = [_speed(batch["prefill"]), _speed(batch["decode"])]
            head = [one["model"], label, str(batch["batch"])]
            rows.append([*head, f"{one['load_seconds']:.1f} s", format_bytes(memory), *speeds])
    return rows


def _speed(found: dict[str, Any] | None) -> str:
    if found is None:
        return "–"
    return f"{found['median']:,.1f} ({found['min']:,.1f} to {found['max']:,.1f})"
