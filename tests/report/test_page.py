"""The page itself: its size, that it needs nothing else, that names stay text, that a browser draws it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.report_page import Page, browser, figure, save_index, synthetic_index

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\u2028&amp;{{ 7 * 7 }}"


def test_a_large_model_fits_in_three_megabytes(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    save_index(synthetic_index(32, 14_336), tmp_path / "index")
    surgeon("report", "index", "--out", "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3_000_000
    page = Page(tmp_path / "page.html")
    assert set(figure(page.data, "lp-curve")["frames"]) == {str(layer) for layer in range(32)}
    assert "at most 150 channels of each group are drawn" in page.text
    rest = figure(page.data, "lp-against-weight-norm")["frames"]["0"][0]
    assert len(rest["points"]) == 150 and rest["of"] > 14_000


def test_a_page_needs_nothing_but_itself(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    save_index(synthetic_index(3, 100), tmp_path / "index")
    surgeon("report", "index", "--out", "page.html")
    page = Page(tmp_path / "page.html")
    for tag, attributes in page.elements:
        assert "src" not in attributes and "style" not in attributes, tag
        assert not any(name.startswith("on") for name in attributes), tag
        if tag not in ("a", "link"):
            assert "href" not in attributes
        if tag == "link":
            assert (attributes["href"] or "").startswith("data:")
    (policy,) = [a["content"] or "" for t, a in page.elements if a.get("http-equiv")]
    assert policy.startswith("default-src 'none'") and "unsafe" not in policy
    for kind, attributes, text in page.inline:
        if attributes.get("type") == "application/json":
            continue
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy, kind
        assert not re.search(r"@import|url\(|sourceMappingURL|XMLHttpRequest|fetch\(", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    controls = [attributes for tag, attributes in page.elements if tag in ("input", "canvas", "details")]
    labelled = {attributes["for"] for tag, attributes in page.elements if tag == "label"}
    for attributes in controls:
        assert attributes.get("aria-label") or attributes.get("id") in labelled or "data-figure" in attributes


def test_names_from_a_model_stay_text(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    save_index(synthetic_index(3, 100, name=HOSTILE), tmp_path / "index")
    surgeon("report", "index", "--out", "page.html")
    page = Page(tmp_path / "page.html")
    assert page.data["title"] == HOSTILE
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert len([tag for tag, _ in page.elements if tag == "script"]) == 3
    assert "<img src=x" in page.text and "{{ 7 * 7 }}" in page.text


def test_a_browser_draws_every_chart(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    chromium = browser()
    save_index(synthetic_index(4, 200, name=HOSTILE), tmp_path / "index")
    surgeon("report", "index", "--out", "page.html")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    address = (tmp_path / "page.html").as_uri()
    command = [chromium, *options, profile, "--virtual-time-budget=5000", "--dump-dom", address]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    drawn = re.search(r'data-drawn="(\d+)"', result.stdout)
    charts = [
        f
        for s in Page(tmp_path / "page.html").data["sections"]
        for f in s["figures"]
        if f["kind"] != "matrix"
    ]
    assert drawn and int(drawn[1]) == len(charts)
    assert "CONSOLE" not in result.stderr, result.stderr


POINT = """
const canvas = document.getElementById("chart-lp-concentration");
const place = canvas.getBoundingClientRect();
const chart = Chart.getChart(canvas);
const { x, y } = chart.getDatasetMeta(1).data[2];
const where = { clientX: place.left + x, clientY: place.top + y, bubbles: true };
canvas.dispatchEvent(new MouseEvent("mousemove", where));
requestAnimationFrame(() => setTimeout(() => {
  const shown = document.querySelector("#figure-lp-curve output").textContent;
  const curve = Chart.getChart("chart-lp-curve").data.datasets[0].data[0].y;
  const slider = document.getElementById("layer-lp-against-weight-norm");
  slider.value = "1";
  slider.dispatchEvent(new Event("input"));
  const outputs = [...document.querySelectorAll(".layer-control output")];
  const moved = outputs.map((output) => output.textContent).join();
  document.querySelector("details").open = true;
  document.title = JSON.stringify({ shown, curve, moved, spoken: slider.getAttribute("aria-valuetext") });
}, 200));
"""


def test_layers_are_chosen_by_pointing_and_by_keys(tmp_path: Path, surgeon: Callable[..., Any]) -> None:
    chromium = browser()
    save_index(synthetic_index(4, 200), tmp_path / "index")
    surgeon("report", "index", "--out", "page.html")
    text = (tmp_path / "page.html").read_text()
    text = re.sub(
        r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text
    )  # to let the test's script in
    (tmp_path / "driven.html").write_text(text.replace("</body>", f"<script>{POINT}</script></body>"))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    command = [chromium, *options, profile, (tmp_path / "driven.html").as_uri()]
    dumped = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (tmp_path / "dumped.html").write_text(dumped)
    found = json.loads(re.findall(r"<title>(.*?)</title>", dumped)[0])
    frames = figure(Page(tmp_path / "page.html").data, "lp-curve")["frames"]
    assert found["shown"] == "2" and found["curve"] == frames["2"][0]["points"][0][1]
    assert set(found["moved"].split(",")) == {"1"} and found["spoken"] == "layer 1"
    assert Page(tmp_path / "dumped.html").text.count("top 1% (supernodes)") >= 4
