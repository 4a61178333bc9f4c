"""The examples run, the documents are fresh, and every command and setting that they show exists."""

from __future__ import annotations

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lorikit.cli import app
from lorikit.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIAL = ROOT / "examples" / "llama3-8b-huanhuan.yaml"


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[str]:
    """The shell commands of a page, in blocks and in `lorikit ...` in the text; lines that end in \\ are joined."""
    text = page.read_text(encoding="utf-8")
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`(lorikit [^`]+)`", text.replace("\n", " "))
    return [line.split("  #")[0].split(" #")[0].strip() for line in [*lines, *inline]]


LORIKIT_COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line}")
    for page in PAGES
    for line in dict.fromkeys(commands(page))
    if line.startswith("lorikit ")
]
MAKE_TARGETS = sorted({word for page in PAGES for word in re.findall(r"`make ([a-z]+)", page.read_text("utf-8"))})


def test_the_tutorial_file_has_the_settings_of_the_tutorial():
    config = load_config(TUTORIAL)
    assert config.model.name_or_path == "LLM-Research/Meta-Llama-3-8B-Instruct"
    assert (config.model.hub, config.model.dtype) == ("modelscope", "bfloat16")
    assert (config.data.train, config.data.max_length, config.data.template) == ("huanhuan.json", 384, "auto")
    lora = config.lora
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (8, 32, 0.1)
    assert lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    train = config.train
    assert (train.per_device_train_batch_size, train.gradient_accumulation_steps) == (4, 4)
    assert (train.logging_steps, train.save_steps, train.num_train_epochs) == (10, 100, 3)
    assert (train.learning_rate, train.save_on_each_node, train.gradient_checkpointing) == (1e-4, True, True)


def test_every_example_is_a_run_that_can_be_loaded():
    files = sorted((ROOT / "examples").glob("*.yaml"))
    assert TUTORIAL in files
    for file in files:
        load_config(file)


def test_the_page_of_settings_is_what_the_settings_model_gives():
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_run_shown_in_a_document_can_be_loaded(page, tmp_path):
    for number, block in enumerate(blocks(page, "yaml")):
        file = tmp_path / f"{number}.yaml"
        file.write_text(block, encoding="utf-8")
        assert load_config(file).train.output_dir


@pytest.mark.parametrize("line", LORIKIT_COMMANDS)
def test_a_command_shown_in_a_document_exists_with_all_its_flags(line):
    tokens = shlex.split(line)[1:]
    if tokens[0].startswith("--"):
        assert tokens in (["--help"], ["--version"])
        return
    if len(tokens) == 1:  # the verb by its name alone
        assert tokens[0] in set(app)
        return
    command, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    assert command.__name__ == tokens[0]
    if tokens[0] == "train":
        load_config(TUTORIAL, bound.args[1:])
    for token in tokens:
        if token.startswith("examples/"):
            assert (ROOT / token).is_file(), token


def test_every_make_target_shown_in_a_document_exists():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", text, re.MULTILINE))
    assert {"demo", "test"} <= set(MAKE_TARGETS) <= targets


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_inside_the_repository_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            if anchor:
                heads = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads], target


def test_the_schema_of_the_settings_knows_every_key_of_the_tutorial_file():
    tree = yaml.safe_load(TUTORIAL.read_text(encoding="utf-8"))
    schema = type(load_config(TUTORIAL)).model_json_schema()
    for group, values in tree.items():
        definition = schema["properties"][group]
        name = (definition.get("$ref") or definition["allOf"][0]["$ref"]).rpartition("/")[2]
        assert set(values) <= set(schema["$defs"][name]["properties"])


def test_the_training_loop_to_read_has_at_most_100_lines():
    assert len((ROOT / "examples" / "loop.py").read_text(encoding="utf-8").splitlines()) <= 100


@pytest.mark.slow
def test_the_training_loop_to_read_lowers_the_loss_of_a_real_model():
    command = [sys.executable, str(ROOT / "examples" / "loop.py"), "--train.max_steps", "4"]
    command += ["--train.per_device_train_batch_size", "2", "--train.gradient_accumulation_steps", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
    assert "before:" in done.stdout and "after:" in done.stdout
