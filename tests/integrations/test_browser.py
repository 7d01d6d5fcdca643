"""The report in headless Chromium: nothing missing, no error, readable in both colour schemes."""

import io
import math
import shutil

import matplotlib.image
import numpy as np
import pytest
import torch
from playwright.sync_api import sync_playwright

import sosd_fast
from sosd_fast.runs.records import JsonLines
from sosd_fast.runs.report import write_report

# The height of the letters in each text of a figure, in pixels of the screen; its exponents are smaller.
LETTERS = """
[...document.querySelectorAll('figure svg text')].filter(text => text.getClientRects().length).map(text => {
  const to = text.getScreenCTM();
  const sizes = [text, ...text.querySelectorAll('tspan')].filter(e => e.textContent.trim())
    .map(e => parseFloat(getComputedStyle(e).fontSize));
  return Math.hypot(to.a, to.b) * (text.querySelector('tspan') ? Math.max(...sizes.slice(1)) : sizes[0]);
})
"""


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    for name, lr in (("adamw", 1e-3), ("muon", 1e-2)):
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"attn": torch.nn.Linear(32, 32), "mlp": torch.nn.Linear(32, 64)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        with sosd_fast.track(model, method="full", run_dir=folder / name):
            log = JsonLines(folder / name / "log.jsonl")
            for step in range(1, 30):
                loss = model["mlp"](model["attn"](torch.randn(8, 32))).square().mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                log.write({"step": step, "loss": loss.item()})
            log.close()
    return write_report([folder / "adamw", folder / "muon"], folder / "report.html")


@pytest.mark.parametrize("width", [390, 1000, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_report(page_file, scheme, width):
    browser_path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert browser_path, "no Chromium: apt-get install chromium"
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page(color_scheme=scheme, viewport={"width": width, "height": 800})
        complaints, requests = [], []
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        bars = "[...document.querySelectorAll('body *')].filter(e => e.scrollWidth > e.clientWidth + 1 && "
        bars += "['auto', 'scroll'].includes(getComputedStyle(e).overflowX)).length"
        wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        page.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")  # the numbers, too
        opened = page.evaluate(wide), page.evaluate(bars)
        page.evaluate("document.querySelectorAll('figure + details').forEach(e => e.open = false)")
        hints = page.locator("figure svg title").all_text_contents()
        boxes = [f.bounding_box() for f in page.locator("figure svg:visible").all()]
        letters = page.evaluate(LETTERS)
        shot = matplotlib.image.imread(io.BytesIO(page.screenshot(full_page=True)))[..., :3]  # (height, width, 3)
        overflow = page.evaluate(wide)
        browser.close()
    assert not complaints and all(url.startswith(("file:", "data:")) for url in requests) and overflow <= 0
    assert opened == (0, 0) and any("at step 29; largest" in hint for hint in hints)
    assert len(boxes) == 2 + 2 * 2 and all(b and b["width"] > 200 and b["height"] > 100 for b in boxes)
    paper = {"light": (1.0, 1.0, 1.0), "dark": (22 / 255, 24 / 255, 27 / 255)}[scheme]
    assert shot[2, 2] == pytest.approx(paper, abs=0.01)
    assert len(letters) > 60 and min(letters) >= 9, "too small to be read"
    for b in boxes:  # each figure is drawn, in colours, and in ink that stands out from the paper
        drawn = shot[math.ceil(b["y"]) : int(b["y"] + b["height"]), math.ceil(b["x"]) : int(b["x"] + b["width"])]
        grey, colour = drawn.mean(-1), drawn.max(-1) - drawn.min(-1)
        assert (colour > 0.2).mean() > 0.002 and (np.abs(grey - np.mean(paper)) > 0.6).mean() > 0.002
