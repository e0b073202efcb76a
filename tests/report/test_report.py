"""Reports: their numbers against what other commands print, and what is refused."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.report_page import WEIGHT, Page, figure, heights, save_index, synthetic_index, table
from helpers.tiny_models import CALIBRATION
from transformers import AutoModelForCausalLM, AutoTokenizer

from surgery.index.channel_index import ChannelIndex, LayerIndex
from surgery.report.page import shown


def test_numbers_of_an_index_are_those_show_prints(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    surgeon("index", str(save_tiny("llama")), "--out", "index", *CALIBRATION)
    index = ChannelIndex.load("index")
    index.super_weights, index.echoes = [WEIGHT], [WEIGHT]
    index.save(Path("index"))
    fields = json.loads(surgeon("show", "index", "--json").stdout)
    printed = json.loads(surgeon("report", "index", "--out", "page.html", "--json").stdout)
    page, saved = Page(tmp_path / "page.html"), json.loads((tmp_path / "page.json").read_text())
    assert page.data == saved == printed
    layers = fields["layers"]
    for series, key in (("top 5%", "0.05"), ("top 1% (supernodes)", "0.01"), ("top 0.1%", "0.001")):
        assert heights(saved, "lp-concentration", series) == [layer["lp_share"][key] for layer in layers]
    for series, key in (("top by mean u²", "activation_power"), ("top by weight norm", "weight_norm")):
        assert heights(saved, "overlap", series) == [layer["overlap"][key] for layer in layers]
    halos = [layer["halo"]["redundancy_mean"] for layer in layers]
    assert heights(saved, "halo-redundancy", "halo") == halos
    for way in ("input", "output"):
        maxima = [layer["prompt_max"][way] for layer in layers]
        assert heights(saved, "spikes", f"largest |{way}|") == maxima
    middle = statistics.median(layer["lp_share"]["0.01"] for layer in layers)
    assert f"{100 * middle:.1f}%" in page.text
    assert shown(fields["loss"]["perplexity"], "number") in page.text
    assert fields["calibration"]["sha256"] in page.text
    row = table(saved, "super-weights")["rows"][0]
    assert row[:8] == [1, 3, 7, -0.6055, -443.5, 300.5, 0.8936, 0.75]
    for words in ("-0.6055", "-443.5", "300.5", "89.4%", "1,234", "matches Some-8B: a paper"):
        assert words in page.text, words
    assert figure(saved, "persistence")["series"][0]["values"][0] == [1, 1 + round(0.75 * 4)]


def test_curves_and_points_are_the_statistics(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    index = synthetic_index(3, 400)
    save_index(index, tmp_path / "index")
    surgeon("report", "index", "--out", "page.html")
    fields = json.loads((tmp_path / "page.json").read_text())
    for layer in range(3):
        proxy = index.layers[layer].statistics["loss_proxy"].double()
        ordered = proxy.sort(descending=True).values
        (curve,) = figure(fields, "lp-curve")["frames"][str(layer)]
        assert curve["points"][0][0] == 1 / 400 and curve["points"][-1] == [1.0, 1.0]
        for share, mass in curve["points"]:
            held = float(ordered[: round(share * 400)].sum() / ordered.sum())
            assert mass == pytest.approx(held, rel=1e-3)
        groups = figure(fields, "lp-against-activation-power")["frames"][str(layer)]
        core = next(group for group in groups if group["name"] == "supernodes")
        power = index.layers[layer].statistics["activation_power"]
        expected = [(float(power[i]), float(proxy[i])) for i in index.layers[layer].supernodes]
        for point, place in zip(sorted(core["points"]), sorted(expected), strict=True):
            assert tuple(point) == pytest.approx(place, rel=1e-3)
        assert sum(group["of"] for group in groups) == 400


def test_several_indexes(save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        source = save_tiny("llama", name=f"step{seed}", seed=seed)
        surgeon("index", str(source), "--out", f"training/step{seed}", *CALIBRATION)
    compared = json.loads(surgeon("show", "training", "--json").stdout)["indexes"]
    surgeon("report", "training", "--figures", "drawn")
    page = Page(tmp_path / "training-report.html")
    fields = page.data
    shared = figure(fields, "supernodes-shared")
    assert [row["values"][-1] for row in shared["series"]] == [row["supernodes_shared"] for row in compared]
    assert [row["values"][n] for n, row in enumerate(shared["series"])] == [1.0, 1.0, 1.0]
    for series, key in (("median of layers", "median"), ("largest of all layers", "max")):
        found = heights(fields, "concentration-over-indexes", series)
        assert found == [row[f"lp_share_{key}"] for row in compared]
    assert [row[0] for row in table(fields, "indexes")["rows"]] == [row["name"] for row in compared]
    surgeon("index", str(save_tiny("gemma2")), "--out", "other", *CALIBRATION)
    save_index(synthetic_index(3, 100), tmp_path / "large")
    surgeon("report", "other", "large", "--out", "models.html")
    assert "can't be matched" in Page(tmp_path / "models.html").text


def test_a_pruned_folder(save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path) -> None:
    source = str(save_tiny("llama"))
    surgeon("index", source, "--out", "index", *CALIBRATION)
    size = ["--index", "index", "--sparsity", "0.5", "--multiple-of", "8"]
    surgeon("prune", source, *size, "--eval", "text.txt", "--eval-blocks", "2", "--out", "cut")
    text = ["--text", "text.txt", "--text-blocks", "2"]
    surgeon("compare", source, "--index", "index", "--multiple-of", "8", *text, "--out", "compared")
    surgeon("report", "cut", "--index", "index", "--compare", "compared", "--out", "page.html")
    page, manifest = Page(tmp_path / "page.html"), json.loads((tmp_path / "cut" / "surgeon.json").read_text())
    fields, plan = page.data, manifest["plan"]
    rows = {row[0]: row[1:3] for row in table(fields, "dense-pruned")["rows"]}
    measured = manifest["measurements"]
    assert rows["perplexity"] == [measured["dense"]["perplexity"], measured["pruned"]["perplexity"]]
    assert rows["size"] == [manifest["source"]["bytes"], manifest["result"]["bytes"]]
    assert shown(measured["pruned"]["perplexity"], "number") in page.text
    protected, kept, removed = (series["values"] for series in figure(fields, "channels")["series"])
    assert [a + b for a, b in zip(protected, kept, strict=True)] == [
        layer["width"] for layer in plan["layers"]
    ]
    assert protected == [len(layer["protected"]) for layer in plan["layers"]]
    assert [sum(three) for three in zip(protected, kept, removed, strict=True)] == [48] * 6
    assert heights(fields, "lp-kept", "kept channels") == [layer["lp_kept"] for layer in plan["layers"]]
    survival = {row[0].split(" ")[0]: row for row in table(fields, "survival")["rows"]}
    for method in ("wanda", "magnitude", "random", "scar-lp"):
        how = ["--method", method, "--no-protect", "--repair", "none", "--dry-run", "--json"]
        alone = json.loads(surgeon("prune", source, *size, *how).stdout)["plan"]["layers"]
        assert survival[method][2] == sum(layer["supernodes_kept"] for layer in alone)
        assert survival[method][5] == pytest.approx(sum(layer["lp_kept"] for layer in alone) / 6)
    drawn = figure(fields, "loss-against-size-0")["series"]
    comparison = json.loads((tmp_path / "compared" / "compare.json").read_text())["rows"]
    expected = {(row["parameters"] / 1e6, row["perplexity"]) for row in comparison}
    assert {tuple(point) for series in drawn for point in series["points"]} == expected
    assert manifest["command"] in page.text and manifest["calibration"]["sha256"] in page.text
    assert "lp-concentration" in {f["id"] for s in fields["sections"] for f in s["figures"]}


def test_both_models_write(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    source = save_tiny("llama")
    surgeon(
        *("prune", str(source), "--sparsity", "0.5", "--multiple-of", "8", "--allocation", "score"),
        *("--repair", "none", "--out", "cut", *CALIBRATION),
    )
    how = ["--generate", str(source), "--prompt", "Once <b>upon", "--tokens", "4"]
    surgeon("report", "cut", *how, "--out", "page.html")
    page = Page(tmp_path / "page.html")
    (quote,) = [q for section in page.data["sections"] for q in section["quotes"]]
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    ids = tokenizer(quote["prompt"], return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert quote["texts"][0] == ["dense", tokenizer.decode(ids[0, start:], skip_special_tokens=True)]
    refused = surgeon("report", "cut", "--generate", "nowhere", "--out", "other.html", code=1)
    assert "can't be loaded" in refused.stderr
    assert quote["texts"][1][0] == "pruned" and "Once <b>upon" in page.text


def test_experts_are_pooled(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    source = str(save_tiny("mixtral"))
    surgeon("index", source, "--out", "index", *CALIBRATION)
    cut = ["--sparsity", "0.5", "--multiple-of", "8", "--repair", "none", "--out", "cut"]
    surgeon("prune", source, "--index", "index", *cut)
    surgeon("report", "cut", "--index", "index", "--out", "page.html")
    fields = json.loads((tmp_path / "page.json").read_text())
    index = ChannelIndex.load("index")
    groups = figure(fields, "lp-against-activation-power")["frames"]["0"]
    assert sum(group["of"] for group in groups) == sum(ffn.width for ffn in index.layers[0].experts)
    three = zip(*(series["values"] for series in figure(fields, "channels")["series"]), strict=True)
    assert [sum(values) for values in three] == [
        sum(ffn.width for ffn in layer.ffns.values()) for layer in index.layers
    ]
    surgeon("report", "cut", "--out", "alone.html")
    assert '"channels"' not in (tmp_path / "alone.json").read_text()


def test_layers_without_an_ffn_are_left_out(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    index = synthetic_index(4, 200)
    index.layers[2] = LayerIndex({})
    save_index(index, tmp_path / "index")
    surgeon("report", "index", "--out", "page.html", "--figures", "drawn")
    fields = Page(tmp_path / "page.html").data
    (line,) = [s for s in figure(fields, "lp-concentration")["series"] if s["style"] == "core"]
    assert [x for x, _ in line["points"]] == [0, 1, 3]
    assert set(figure(fields, "lp-curve")["frames"]) == {"0", "1", "3"}


def test_figures_for_papers(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    save_index(synthetic_index(4, 200), tmp_path / "index")
    surgeon("report", "index", "--out", "page.html", "--figures", "drawn")
    fields = json.loads((tmp_path / "page.json").read_text())
    names = {f["id"] for section in fields["sections"] for f in section["figures"]}
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    }
    before = {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}
    assert all(text.startswith(b"\x89PNG") for name, text in before.items() if name.endswith("png"))
    assert all(b"<svg" in text for name, text in before.items() if name.endswith("svg"))
    surgeon("report", "index", "--out", "page.html", "--figures", "drawn", "--overwrite")
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "drawn").iterdir()}


def test_refusals_leave_everything_as_it_was(
    save_tiny: Callable[..., Path], surgeon: Callable[..., Any], tmp_path: Path
) -> None:
    save_index(synthetic_index(3, 100), tmp_path / "index")
    (tmp_path / "page.html").write_text("mine")
    refused = surgeon("report", "index", "--out", "page.html", code=1)
    assert "exists" in refused.stderr and (tmp_path / "page.html").read_text() == "mine"
    assert not (tmp_path / "page.json").exists()
    assert "not a readable index" in surgeon("report", "nothing", code=1).stderr
    assert "HTML" in surgeon("report", "index", "--out", "page.pdf", code=2).stderr
    surgeon("report", "index", "--generate", "some/model", code=2)
    surgeon("report", "index", "--prompt", "Hello", code=2)
    surgeon("report", "index", "--index", "index", code=1)
    source = str(save_tiny("llama"))
    surgeon(*("prune", source, "--sparsity", "0.5", "--multiple-of", "8", "--out", "cut", *CALIBRATION))
    other = surgeon("report", "cut", "--index", "index", code=1)
    assert "different models" in other.stderr and "org/large" in other.stderr
    (tmp_path / "table").mkdir()
    comparison = {"source": {"name": "org/other", "shape_digest": "1" * 64}, "rows": []}
    (tmp_path / "table" / "compare.json").write_text(json.dumps(comparison))
    assert "org/other" in surgeon("report", "index", "--compare", "table", code=1).stderr
    (tmp_path / "rounded").mkdir()
    (tmp_path / "rounded" / "surgeon.json").write_text('{"quantization": {}}')
    assert "a quantised one" in surgeon("report", "rounded", code=1).stderr
    assert not list(tmp_path.glob("*-report.*"))
