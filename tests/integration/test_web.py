"""The page as a person uses it, rightly and wrongly: Debian's chromium on `lorikit web`, on a desk's and a phone's screen.

After every scenario: no error on the browser's console, no request to another host, no traceback on the page or in the
server's terminal.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chat_server import chat_server
from tiny_model import save_model, save_run

pytest.importorskip("streamlit", reason="needs the extra web: pip install 'lorikit[web]'")
sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium"),
]
expect = sync_api.expect
WIDE, PHONE = (1280, 900), (390, 844)
ROWS = [{"instruction": f"number {n}?", "output": f"it is {n}"} for n in range(40)]
HOSTILE = "<img src=x onerror='window.stung=1'> **bold** $x$ \u202e"
REPORT = "<!doctype html><title>r</title><h1>The verdict: learned</h1>"


def make_folder(folder: Path) -> Path:
    """What somebody may have lying around: rows good and bad, a finished run, one that was stopped."""
    save_model(folder / "base", longest=2000)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "empty_answer.json").write_text(json.dumps([*ROWS[:3], {"instruction": "who?", "output": ""}]))
    (folder / "hostile.jsonl").write_text(
        "".join(json.dumps({"instruction": HOSTILE + str(n), "output": f"{HOSTILE} {n}"}) + "\n" for n in range(3))
    )
    (folder / "latin.csv").write_bytes("instruction,output\nwo?,für immer\n".encode("latin-1"))
    run = save_run(folder / "runs" / "mine", folder / "base")
    lines = [
        {"step": n, "epoch": n, "loss": 3 - n / 9, "tokens_per_second": 90.0, "learning_rate": 1e-4, "grad_norm": 1.0}
        for n in (1, 2, 3)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    (run / "report.html").write_text(REPORT)
    half = folder / "runs" / "half"
    half.mkdir()
    (half / "config.yaml").write_text((run / "config.yaml").read_text().replace("mine", "half"))
    return folder


@contextmanager
def serving(folder: Path):
    """`lorikit web` on the folder: its address and process. Whatever it has to say must be no traceback."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lorikit", "web", str(folder), "--port", str(port)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LORIKIT_API_KEY": "a key that the page passes on"}
    with (folder.parent / f"{folder.name}.log").open("wb+") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment, text=True)
        try:
            address = process.stdout.readline().strip()
            assert address == f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with closing(socket.socket()) as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            yield address, process
        finally:
            process.terminate()
            process.wait(20)
            log.seek(0)
            said = log.read().decode()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("work") / "folder")


@pytest.fixture(scope="module")
def address(folder):
    with serving(folder) as (address, _):
        yield address


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        expect.set_options(timeout=90_000)
        yield browser
        browser.close()


@contextmanager
def watched(browser, size=WIDE, **options):
    """A page of its own; afterwards its console is clean, and only this machine was asked."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    page = context.new_page()
    page.set_default_timeout(90_000)
    hosts, complaints = set(), []
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    yield page
    assert "Traceback" not in page.locator("body").inner_text()
    context.close()
    assert complaints == []
    assert hosts - {None} == {"127.0.0.1"}


@pytest.fixture(params=[WIDE, PHONE], ids=["desk", "phone"])
def page(request, browser, address):
    with watched(browser, request.param) as page:
        page.goto(address)
        yield page


@pytest.fixture
def desk(browser, address):
    with watched(browser) as page:
        page.goto(address)
        yield page


def go(page, name):
    heading = page.get_by_role("heading", name=name, exact=True, level=1)
    expect(page.get_by_role("heading", level=1)).to_be_visible()
    page.get_by_role("link", name=name, exact=True).click()
    expect(heading).to_be_visible()


def pick(page, label, option):
    box = page.get_by_role("combobox", name=re.compile(re.escape(label)))
    wanted = page.get_by_role("option", name=option, exact=True)
    for attempt in range(6):  # a list closes when the page is drawn anew meanwhile
        box.click()
        box.fill(option)  # a long list holds only what is in sight
        try:
            wanted.click(timeout=8_000)
        except sync_api.TimeoutError:
            assert attempt < 5, f"{option} cannot be picked"
            box.press("Escape")
        else:
            break


def write(page, label, text):
    box = page.get_by_role("textbox", name=label)
    box.fill(text)
    box.press("Tab")


def press(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def start(page, run):
    """Start the run, as often as it takes: a form that moves under the pointer, on a busy machine, loses the click."""
    for patience in (30_000, 30_000, 90_000):
        press(page, "Start")
        try:
            expect(page.get_by_text(f"{run} · ")).to_be_visible(timeout=patience)
        except AssertionError:
            assert patience < 90_000
        else:
            break


def expect_message(page, text):
    """One message on the page that holds the text."""
    expect(page.get_by_test_id("stAlert").filter(has_text=text)).to_have_count(1)


def check(page, folder, file, model="base"):
    expect(page.get_by_role("button", name="Check", exact=True)).to_be_visible()
    pick(page, "File in the working folder", file)
    write(page, "Model (folder, name or hub id)", str(folder / model) if model else "")
    press(page, "Check")


def new_run(page, folder, name, **settings):
    go(page, "Train")
    write(page, "Name of the run", name)
    pick(page, "Rows", "rows.json")
    write(page, "Model (folder, name or hub id)", str(folder / "base"))
    for label, value in settings.items():
        write(page, label.replace("_", " "), value)


def more(page, group, **settings):
    """Fill in what stands under "All settings"."""
    page.get_by_text("All settings").click()
    page.get_by_role("tab", name=group, exact=True).click()
    for name, value in settings.items():
        write(page, name, value)


def connect(page, url):
    go(page, "Compare")
    page.get_by_text("A server with an address").click()
    write(page, "Address of an OpenAI-compatible server", url)
    press(page, "Connect")


# Data


def test_good_rows_are_accounted_for_with_their_lengths_and_their_mask(page, folder):
    check(page, folder, "rows.json")
    expect_message(page, "This data can be trained on")
    expect(page.get_by_test_id("stMetric").filter(has_text="Rows read")).to_contain_text("40")
    expect(page.locator(".lorikit .row .learnt", has_text=re.compile(r"it is \d")).first).to_be_visible()
    expect(page.get_by_test_id("stVegaLiteChart").locator("canvas, svg").first).to_be_visible()


def test_rows_that_training_would_refuse_are_named_with_their_line(page, folder):
    check(page, folder, "empty_answer.json")
    expect_message(page, "empty_answer.json:1 row 4: output is empty")


def test_what_rows_say_stays_text(page, folder):
    check(page, folder, "hostile.jsonl")
    expect(page.locator(".lorikit .row .learnt").first).to_contain_text(
        "<img src=x onerror='window.stung=1'> **bold** $x$ \\u202e"
    )
    assert page.evaluate("window.stung") is None


def test_a_file_in_another_encoding_gets_one_message(page, folder):
    check(page, folder, "latin.csv")
    expect_message(page, "UTF-8")


def test_a_model_that_is_nowhere_and_one_that_is_not_named_get_one_message(page, folder):
    check(page, folder, "rows.json", model="nowhere")
    expect_message(page, "no such file or folder")
    check(page, folder, "rows.json", model=None)
    expect_message(page, "Name a model first")


def test_a_row_can_be_asked_for_and_one_that_is_not_there_gets_a_message(desk, folder):
    write(desk, "Show this row (file:line)", "elsewhere.json:3")
    check(desk, folder, "rows.json")
    expect_message(desk, "the rows are from rows.json")


def test_an_upload_lands_in_the_folder_under_a_harmless_name_and_can_be_checked(page, folder, request):
    name = f"{request.node.callspec.id} rows.json"
    content = json.dumps(ROWS[:5]).encode()
    upload = page.get_by_test_id("stFileUploaderDropzoneInput")
    upload.set_input_files([{"name": name, "mimeType": "application/json", "buffer": content}])
    expect_message(page, f"Saved as uploads/{name}")
    assert (folder / "uploads" / name).read_bytes() == content
    expect(page.get_by_role("combobox", name=re.compile("File in the working folder"))).to_have_value(f"uploads/{name}")


def test_an_upload_that_is_empty_or_of_another_kind_gets_a_message_and_is_not_kept(page, folder):
    upload = page.get_by_test_id("stFileUploaderDropzoneInput")
    upload.set_input_files([{"name": "nothing.json", "mimeType": "application/json", "buffer": b""}])
    expect_message(page, "nothing.json: the file is empty")
    page.reload()
    upload.set_input_files([{"name": "virus.exe", "mimeType": "application/json", "buffer": b"MZ"}])
    expect_message(page, "virus.exe: rows are read from .json")
    assert not (folder / "uploads" / "nothing.json").exists()
    assert not list(folder.rglob("virus*"))


# Train


def test_impossible_settings_are_named_with_what_is_allowed(page, folder):
    new_run(page, folder, "wrong", Rank="0", Learning_rate="fast")
    press(page, "Start")
    expect_message(page, "lora.r is 0: it should be greater than or equal to 1")
    expect_message(page, "train.learning_rate is 'fast'")
    assert not (folder / "runs" / "wrong.yaml").exists()


def test_a_run_cannot_be_put_elsewhere_or_over_another_one(page, folder):
    new_run(page, folder, "../../elsewhere")
    press(page, "Start")
    expect_message(page, "letters, digits, - and _ are allowed")
    write(page, "Name of the run", "mine")
    press(page, "Start")
    expect_message(page, "there is a run mine already")


def test_the_plan_says_steps_memory_and_time_before_anything_starts(desk, folder):
    new_run(desk, folder, "planned")
    press(desk, "Plan")
    expect(desk.get_by_test_id("stMetric").filter(has_text="Steps")).to_contain_text("9")
    expect(desk.get_by_test_id("stMetric").filter(has_text="Memory")).to_contain_text("GiB")
    assert not (folder / "runs" / "planned.yaml").exists()


def test_a_run_is_started_drawn_and_finished(desk, folder):
    new_run(desk, folder, "short", Epochs="1")
    more(desk, "train", logging_steps="1")
    start(desk, "short")
    expect(desk.get_by_text("short · finished · step 3 of 3")).to_be_visible(timeout=120_000)
    expect(desk.get_by_test_id("stVegaLiteChart").first).to_be_visible()
    assert (folder / "runs" / "short" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_run_that_cannot_train_says_why_on_the_page(desk, folder):
    new_run(desk, folder, "failing")
    write(desk, "Model (folder, name or hub id)", str(folder / "nowhere"))
    press(desk, "Start")
    expect_message(desk, "no such file or folder")
    expect(desk.get_by_text("failing · stopped")).to_be_visible()


def test_a_run_is_stopped_goes_on_and_outlives_the_page_and_its_server(browser, tmp_path):
    folder = make_folder(tmp_path / "folder")
    with serving(folder) as (address, server), watched(browser) as page:
        page.goto(address)
        new_run(page, folder, "long")
        more(page, "train", logging_steps="1", max_steps="100000")
        start(page, "long")
        expect(page.get_by_text(re.compile(r"long · running · step [1-9]\d* of 100000"))).to_be_visible(timeout=120_000)
        press(page, "Stop")
        expect(page.get_by_text("long · stopped")).to_be_visible()
        expect_message(page, "stopped by SIGTERM after step")
        press(page, "Go on")
        expect(page.get_by_text("long · running").first).to_be_visible()
        note = folder / "runs" / "long.json"
        pid = json.loads(note.read_text())["pid"]
        metrics = folder / "runs" / "long" / "metrics.jsonl"
        page.goto("about:blank")
        server.terminate()
        server.wait(20)
        try:
            before, deadline = metrics.stat().st_size, time.monotonic() + 60
            while metrics.stat().st_size <= before:
                assert time.monotonic() < deadline, (note.with_suffix(".log")).read_text()
                time.sleep(0.2)
        finally:
            os.kill(pid, signal.SIGTERM)


# Compare


def test_an_address_where_no_server_is_or_that_is_none_gets_a_message(page):
    connect(page, "http://127.0.0.1:9")
    expect_message(page, "cannot be reached")
    write(page, "Address of an OpenAI-compatible server", "my server")
    press(page, "Connect")
    expect_message(page, "is no address of a server")


def test_answers_stand_side_by_side_as_text(page):
    with chat_server() as url:
        connect(page, url)
        write(page, "Question", HOSTILE)
        press(page, "Ask")
        for model in ("base", "mine"):
            expect(page.get_by_text(f"{model} says: <img src=x onerror='window.stung=1'> **bold** $x$")).to_be_visible()
    assert page.evaluate("window.stung") is None


def test_a_blind_vote_hides_the_names_until_it_is_given_and_is_kept_in_the_run(page, folder):
    file = folder / "runs" / "mine" / "votes.jsonl"
    before = len(file.read_text().splitlines()) if file.exists() else 0
    with chat_server() as url:
        connect(page, url)
        write(page, "Question", "who are you?")
        page.get_by_text("Blind vote").click()
        press(page, "Ask")
        expect(page.get_by_role("button", name="A is better")).to_be_visible()
        expect(page.get_by_text(re.compile("^A: "))).to_have_count(0)
        press(page, "B is better")
        expect_message(page, "Kept in runs/mine/votes.jsonl")
        expect(page.get_by_text(re.compile("^B: (base|mine)$"))).to_be_visible()
    votes = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(votes) == before + 1
    assert votes[-1]["winner"] == votes[-1]["models"][1]
    assert votes[-1]["answers"][1].startswith(votes[-1]["winner"])


def test_a_run_of_the_folder_is_loaded_asked_beside_its_base_and_unloaded(desk, folder):
    go(desk, "Compare")
    press(desk, "Load them")
    write(desk, "Question", "who are you?")
    spinner = desk.get_by_role("spinbutton", name="Longest answer in tokens")
    spinner.fill("5")
    spinner.press("Tab")
    press(desk, "Ask")
    expect(desk.get_by_test_id("stMain").get_by_text("mine", exact=True).last).to_be_visible()
    expect(desk.get_by_text("who are you?").last).to_be_visible()
    expect(desk.get_by_test_id("stAlert")).to_have_count(0)
    press(desk, "Unload")
    expect(desk.get_by_role("button", name="Load them")).to_be_visible()


def test_what_a_server_says_of_its_failure_stands_where_the_answer_would(desk):
    with chat_server() as url:
        connect(desk, url)
        for question, said in (
            ("break now", "the model fell over"),
            ("refuse", "the line is full, come back later (HTTP 429)"),
            ("nonsense", "no piece of an answer"),
        ):
            write(desk, "Question", question)
            press(desk, "Ask")
            expect(desk.get_by_test_id("stAlert").filter(has_text=said)).to_have_count(2)


def test_no_question_and_a_vote_on_one_model_get_a_message(page):
    with chat_server() as url:
        connect(page, url)
        press(page, "Ask")
        expect_message(page, "Write a question first")
        write(page, "Question", "who?")
        page.get_by_text("Blind vote").click()
        press(page, "Remove mine")
        press(page, "Ask")
        expect_message(page, "needs exactly two models")


# Runs, language, an empty folder


def test_the_runs_are_listed_and_a_report_is_shown_on_the_page(page):
    go(page, "Runs")
    expect(page.get_by_test_id("stDataFrame")).to_be_visible()
    pick(page, "Details of", "mine")
    expect(page.frame_locator("iframe").get_by_role("heading", name="The verdict: learned")).to_be_visible()
    pick(page, "Details of", "half")
    expect_message(page, "This run has no report yet")


def test_the_page_speaks_chinese_when_asked_and_when_the_browser_does(browser, address, page):
    page.get_by_text("中文", exact=True).click()
    expect(page.get_by_role("heading", name="数据", level=1)).to_be_visible()
    page.get_by_role("link", name="训练", exact=True).click()
    expect(page.get_by_role("heading", name="训练", level=1)).to_be_visible()
    with watched(browser, locale="zh-CN") as other:
        other.goto(address)
        expect(other.get_by_role("heading", name="数据", level=1)).to_be_visible()


def test_an_empty_folder_says_on_every_page_what_to_do(browser, tmp_path):
    (tmp_path / "nothing").mkdir()
    with serving(tmp_path / "nothing") as (address, _), watched(browser, PHONE) as page:
        page.goto(address)
        expect_message(page, "There is no file with rows in this folder yet")
        go(page, "Train")
        expect_message(page, "There is no file with rows in this folder yet")
        go(page, "Compare")
        expect_message(page, "No run of this folder has an adapter yet")
        go(page, "Runs")
        expect_message(page, "There is no run in this folder yet")


# The command


def test_the_command_refuses_what_it_cannot_serve(lorikit, tmp_path):
    code, _, err = lorikit("web", tmp_path / "nowhere")
    assert (code, "no such folder" in err) == (2, True)
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = lorikit("web", tmp_path, "--port", taken.getsockname()[1])
    assert (code, "is in use; name another one with --port" in err) == (2, True)
