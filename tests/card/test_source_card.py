"""License, language and obligations survive whatever form the source's card has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.tiny_models import CALIBRATION
from huggingface_hub import ModelCard

from surgery.card.source_card import inherited_metadata
from surgery.cli.main import main

CARDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("---\nlicense: llama3.1\n---\n# x\n", {"license": "llama3.1"}),
    "norwegian": ("---\nlanguage: no\n---\n", {"language": ["no"]}),
    "windows": (
        "\ufeff---\r\nlicense: gemma\r\nlanguage:\r\n- en\r\n- no\r\n---\r\n",
        {"license": "gemma", "language": ["en", "no"]},
    ),
    "comment": (
        "<!-- made by hand -->\n\n---\nlicense: mit\ntags: chat\n---\n",
        {"license": "mit", "tags": ["chat"]},
    ),
    "no end": ("---\nlicense: llama3\n", {"license": "llama3"}),
    "not YAML": (
        "---\nlicense: llama3.1\nlanguage:\n- en\ntags: [a, b\n: :\n---\n",
        {"license": "llama3.1", "language": ["en"], "tags": ["a"]},
    ),
    "odd kinds": (
        "---\nlicense: [mit]\ntags:\n- {a: b}\n- c\nlanguage: {}\n---\n",
        {"license": "mit", "tags": ["c"]},
    ),
    "a list": ("---\n- a\n---\n", {}),
    "no metadata": ("# Model\n", {}),
}


@pytest.mark.parametrize("kind", CARDS)
def test_metadata_of_every_form(kind: str) -> None:
    card, expected = CARDS[kind]
    assert inherited_metadata(card) == expected


@pytest.mark.parametrize("kind", ["norwegian", "windows", "not YAML"])
def test_both_cards_keep_what_the_source_says(
    kind: str,
    save_tiny: Callable[..., Path],
    tmp_path: Path,
    license_text: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("compressed_tensors")
    card, expected = CARDS[kind]
    (save_tiny("llama") / "README.md").write_text(card, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(license_text)
    prune = ["prune", "tiny", "--multiple-of", "8", "--repair", "none", "--out", "cut", *CALIBRATION]
    quantize = [
        "quantize",
        "tiny",
        "--group-size",
        "16",
        "--super-weights",
        "none",
        "--out",
        "q",
        *CALIBRATION,
    ]
    for command, folder in ((prune, "cut"), (quantize, "q")):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        written = ModelCard.load(f"{folder}/README.md")
        for key, value in expected.items():
            found = getattr(written.data, key)
            assert set(value) <= set(found) if isinstance(value, list) else found == value
        text = Path(folder, "README.md").read_text()
        assert ("Built with Llama" in text) == expected.get("license", "").startswith("llama")
        assert ("Gemma Terms of Use" in text) == (expected.get("license") == "gemma")


def test_a_template_that_fails_costs_no_checkpoint(
    save_tiny: Callable[..., Path], tmp_path: Path, license_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny("llama")
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(license_text)
    command = ["prune", "tiny", "--multiple-of", "8", "--repair", "none", "--out", "cut", *CALIBRATION]
    Path("broken.md").write_text("{% if %}")
    refused = CliRunner().invoke(main, [*command, "--card-template", "broken.md"])
    assert refused.exit_code == 2 and "not jinja2" in refused.stderr and not Path("cut").exists()
    Path("undefined.md").write_text("{{ manifest.nobody.knows }}")
    done = CliRunner().invoke(main, [*command, "--card-template", "undefined.md"])
    assert "Warning: the card template failed" in done.stderr
    assert done.exit_code == 0 and "FFNs pruned by" in Path("cut/README.md").read_text()
