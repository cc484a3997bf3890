"""The page of a comparison: labels are text, and in a browser it sorts, changes its axis, fits, and has no error."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from compared import write_run, write_sweep
from zoo.compare.__main__ import main

HOSTILE = "|{{plotly}}</script><img src=x>"


def test_labels_are_text(tmp_path: Path) -> None:
    for k, code in enumerate((HOSTILE, "a")):
        write_run(tmp_path / str(k), "hypernet", config__model__code=code)
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "</script><img" not in (tmp_path / "out" / "index.html").read_text()
    assert "<img" not in (tmp_path / "out" / "table.md").read_text()


PROBE = """<script>addEventListener("error", e => document.body.dataset.error = e.message);
addEventListener("load", () => {
  const first = () => document.querySelector("#systems tbody").firstChild.firstChild.textContent;
  const x = () => document.getElementById("curves").data.at(-1).x.join(), said = { before: first(), tokens: x() };
  document.querySelector("#systems th button").click(); document.querySelector("#systems th button").click();
  const axis = document.getElementById("axis"); axis.value = "seconds"; axis.onchange();
  Object.assign(said, { after: first(), seconds: x(), plots: document.querySelectorAll(".main-svg").length,
    width: document.documentElement.scrollWidth, room: innerWidth, title: document.title,
    error: document.body.dataset.error ?? "" });
  parent.postMessage(said, "*");
});</script>"""
FRAME = """<body><iframe src="index.html" style="width: %dpx; height: 900px; border: 0"></iframe>
<script>addEventListener("message", e => document.body.dataset.said = JSON.stringify(e.data));</script>"""
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_in_a_browser(width: int, tmp_path: Path) -> None:
    sweep = write_sweep(tmp_path / "sweep")
    write_run(sweep / "hostile", "hypernet", config__model__code=HOSTILE)
    out = tmp_path / "out"
    assert main([str(sweep), "--out", str(out)]) == 0
    page = (out / "index.html").read_text()
    assert not re.search(r'<(?:script|link|img)[^>]*(?:src|href)="(?!data:)', page.partition("<script")[0])
    (out / "index.html").write_text(page.replace("<h1>", f"{PROBE}<h1>"))
    (out / "frame.html").write_text(FRAME % width)
    line = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--window-size=1400,1000",
    ]
    line += [
        "--virtual-time-budget=8000",
        f"--user-data-dir={tmp_path}/browser",
        "--dump-dom",
        f"file://{out}/frame.html",
    ]
    answer = subprocess.run(line, capture_output=True, text=True, timeout=60)  # type: ignore[arg-type]
    assert "CONSOLE" not in answer.stderr
    found = re.search(r'data-said="([^"]*)"', answer.stdout)
    assert found, answer.stdout[-500:]
    said = json.loads(found[1].replace("&quot;", '"').replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert said["error"] == ""
    assert said["width"] <= said["room"] == width
    assert said["title"].startswith("4 systems on regression")
    assert said["before"] != said["after"] == "transformer"
    assert said["tokens"] != said["seconds"]
    assert said["plots"] >= 2
