"""What a person gets from `import lorikit`: these names, documented, typed, free until they are used."""

import ast
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import lorikit
from tiny_model import save_model, save_run

NAMES = [
    "Answer",
    "ConfigError",
    "DataError",
    "LorikitError",
    "Message",
    "ModelError",
    "RunConfig",
    "Sampling",
    "Session",
    "__version__",
    "chat",
    "check",
    "compare",
    "generate",
    "load_config",
    "merge",
    "open_run",
    "plan",
    "stream",
    "train",
]


def test_the_public_names_are_exactly_these():
    assert list(lorikit.__all__) == NAMES
    assert dir(lorikit) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_importable_and_documented(name):
    value = getattr(lorikit, name)
    if name == "__version__":
        assert value.count(".") == 2
        return
    assert inspect.getdoc(value)
    if inspect.isfunction(value) or name == "train":
        hints = inspect.signature(value)
        assert hints.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in hints.parameters.values())


def test_type_checkers_see_the_same_names():
    stub = ast.parse(Path(lorikit.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    found = {alias.asname for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    found |= {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert found == set(NAMES)
    for node in stub.body:
        if isinstance(node, ast.ImportFrom) and node.names[0].name != "train":
            assert lorikit._HOME[node.names[0].name] == node.module


def test_an_unknown_name_is_an_attribute_error_that_names_it():
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        lorikit.trian  # noqa: B018


def test_importing_the_package_imports_none_of_its_parts():
    code = "import sys, lorikit; print([m for m in sys.modules if m.startswith('lorikit.') or m == 'torch'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    save_model(folder / "base", longest=400)
    rows = [{"instruction": f"number {n}", "output": f"it is {n}"} for n in range(12)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def settings(folder, **train):
    return lorikit.load_config(
        model={"name_or_path": str(folder / "base")},
        data={"train": str(folder / "rows.json"), "max_length": 128},
        train={"output_dir": str(folder / "run"), "max_steps": 2, **train},
    )


def test_from_settings_to_an_answer_in_a_few_lines(folder):
    config = settings(folder)
    assert lorikit.check(config).report.num_rows == 12
    assert lorikit.plan(config).steps.count == 2
    run = lorikit.train(config)
    session = lorikit.open_run(run)
    greedy = lorikit.Sampling(max_new_tokens=4, temperature=0, repetition_penalty=1)
    one, two = lorikit.generate(session, ["number 3", "number 40"], greedy)
    assert isinstance(one, lorikit.Answer)
    assert (one.num_tokens, two.prompt) == (4, (lorikit.Message("user", "number 40"),))
    assert "".join(lorikit.stream(session, "number 3", greedy)) == one.text
    assert lorikit.compare(run, rows=1).verdict.title
    merged = lorikit.merge(run, folder / "merged")
    assert lorikit.generate(lorikit.open_run(merged.folder, need_adapter=False), "number 3", greedy) == [one]


def test_train_is_called_the_same_before_and_after_its_package_was_imported(folder):
    import lorikit.train.loop

    assert callable(lorikit.train)
    assert lorikit.train.loop.train.__module__ == "lorikit.train.loop"
    with pytest.raises(lorikit.ConfigError, match="other settings"):
        lorikit.train(settings(folder, max_steps=3)) and lorikit.train(settings(folder, max_steps=4))


def test_a_prompt_is_a_text_or_turns_and_a_wrong_one_is_named(tmp_path):
    session = lorikit.open_run(save_run(tmp_path / "run", save_model(tmp_path / "base", longest=400)))
    greedy = lorikit.Sampling(max_new_tokens=3, temperature=0, repetition_penalty=1)
    turns = [{"role": "user", "content": "hello"}]
    text, dicts, messages = (
        lorikit.generate(session, prompt, greedy)[0] for prompt in ("hello", turns, [lorikit.Message("user", "hello")])
    )
    assert text == dicts == messages
    assert lorikit.generate(session, [turns, "hello"], greedy) == [text, text]
    assert lorikit.generate(session, [], greedy) == []
    assert lorikit.generate(session, "hello", greedy, base=True) != [text]
    for wrong, said in (("", "empty"), ([{"role": "king", "content": "x"}], "king"), ([*turns, turns[0]], "turn")):
        with pytest.raises(lorikit.DataError, match=said):
            lorikit.generate(session, wrong, greedy)
    with pytest.raises(lorikit.DataError, match="nothing to answer"):
        lorikit.generate(session, [*turns, {"role": "assistant", "content": "x"}], greedy)
