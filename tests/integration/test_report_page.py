"""The report of a run in a browser: on a wide and a narrow screen, light and dark, with nothing from elsewhere."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml

from tiny_model import save_model

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
ROWS = [{"instruction": f"What is {k}?", "output": f"It is {k} and nothing else."} for k in range(14)]
LONG = {"instruction": "Which? " + "x" * 200, "output": "<script>stung = 1</script>" + "y" * 200}


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """report.html of a run of the tiny model, as `lorikit train` writes it at its end."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "rows.json").write_text(json.dumps([*ROWS, LONG]))
    settings = {
        "model": {"name_or_path": str(save_model(folder / "base", longest=1000))},
        "data": {"train": str(folder / "rows.json"), "max_length": 900},
        "train": {"output_dir": str(folder / "run"), "num_train_epochs": 4, "logging_steps": 1, "learning_rate": 2e-2},
        "eval": {"eval_size": 4},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "lorikit", "train", str(folder / "run.yaml")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "run" / "report.html"


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 900), (390, 844)], ids=["desk", "phone"])
def test_it_reads_well_and_axe_has_no_serious_finding(report, browser, size, scheme):
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page, asked, complaints = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.goto(report.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), "the page scrolls sideways"
    assert page.evaluate("window.stung") is None
    found = axe.Axe().run(page).response["violations"]
    serious = [(one["id"], one["nodes"][0]["html"]) for one in found if one["impact"] in ("serious", "critical")]
    assert serious == []
    assert asked == [report.as_uri()] and complaints == []
    context.close()
