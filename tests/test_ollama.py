"""What Ollama is told of a chat template is what the template renders, and what it cannot be told is refused."""

import json
import re
import shutil
import subprocess

import pytest

from chat_templates import tokenizers
from lorikit.config import DataConfig
from lorikit.data.encode import Encoder
from lorikit.data.values import Message
from lorikit.errors import ModelError
from lorikit.export.ollama import layout_of, modelfile
from tiny_model import save_model, save_run

TALKS = [
    [Message("user", "Who are you?")],
    [Message("system", "You are a clock."), Message("user", "Who?")],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
    [
        Message("system", "s"),
        *(Message(role, f"{role} {n}\nline") for n in range(3) for role in ("user", "assistant")),
        Message("user", "end"),
    ],
]


def encoder(name, **data):
    return Encoder(tokenizers()[name], DataConfig(train="none", **data))


def go(template, messages):
    """What Go's text/template makes of the part of it that we write: if, else, range, fields."""
    told = {".System": "\n\n".join(m.content for m in messages if m.role == "system")}
    parts = re.split(r"(\{\{ .*? \}\})", template)

    def run(at, fields, show):
        out = ""
        while at < len(parts):
            word = parts[at].strip("{} ") if parts[at].startswith("{{") else None
            if word is None:
                out += parts[at] if show else ""
            elif word.startswith("if "):
                chosen, done = show and holds(word[3:], fields), False
                while True:
                    text, at, word = run(at + 1, fields, chosen)
                    out, done = out + text, done or chosen
                    if word == "end":
                        break
                    chosen = show and not done and (word == "else" or holds(word.removeprefix("else if "), fields))
            elif word == "range .Messages":
                for message in messages:
                    text, end, _ = run(at + 1, {".Role": message.role, ".Content": message.content}, show)
                    out += text
                at = end
            elif word == "end" or word.startswith("else"):
                return out, at, word
            else:
                out += fields[word] if show else ""
            at += 1
        return out, at, None

    def holds(condition, fields):
        if condition.startswith("eq .Role "):
            return fields[".Role"] == json.loads(condition.removeprefix("eq .Role "))
        return bool(fields[condition])

    return run(0, told, True)[0]


CASES = [("llama3", "<|begin_of_text|>"), ("chatml", ""), ("qwen2.5", "")]


@pytest.mark.parametrize(("name", "bos"), CASES)
@pytest.mark.parametrize("data", [{}, {"system": "Speak in rhymes."}], ids=["", "with a system prompt"])
def test_gos_template_renders_what_the_chat_template_renders_without_bos(name, bos, data):
    own = encoder(name, **data)
    template = layout_of(own).go_template()
    for talk in TALKS:
        assert bos + go(template, talk) == own.render(talk, generate=True)


@pytest.mark.skipif(shutil.which("go") is None, reason="Go is not installed")
@pytest.mark.parametrize(("name", "bos"), CASES)
def test_go_itself_agrees(name, bos, tmp_path):
    own = encoder(name)
    (tmp_path / "main.go").write_text(
        'package main\nimport ("encoding/json"; "os"; "text/template")\n'
        "type M struct { Role, Content string }\ntype T struct { Template, System string; Messages []M }\n"
        "func main() { var t T; if json.NewDecoder(os.Stdin).Decode(&t) != nil { os.Exit(2) }\n"
        'template.Must(template.New("t").Parse(t.Template)).Execute(os.Stdout, t) }\n'
    )
    subprocess.run(["go", "build", "-o", "render", "main.go"], cwd=tmp_path, check=True, env=None)
    for talk in TALKS:
        system = "\n\n".join(m.content for m in talk if m.role == "system")
        messages = [{"Role": m.role, "Content": m.content} for m in talk]
        told = {"Template": layout_of(own).go_template(), "System": system, "Messages": messages}
        done = subprocess.run([tmp_path / "render"], input=json.dumps(told).encode(), capture_output=True, check=True)
        assert bos + done.stdout.decode() == own.render(talk, generate=True)


@pytest.mark.parametrize("name", ["qwen3", "gemma"])
def test_a_template_that_does_more_than_to_frame_turns_is_refused(name):
    with pytest.raises(ModelError, match=r"Ollama's cannot say: take lorikit merge"):
        modelfile(encoder(name))


def test_the_modelfile_names_the_stop_tokens_and_the_sampling_of_chat():
    text = modelfile(encoder("llama3"))
    assert text.startswith('FROM .\nTEMPLATE """') and 'PARAMETER stop "<|eot_id|>"' in text
    assert "PARAMETER temperature 0.5\nPARAMETER top_p 0.9\nPARAMETER repeat_penalty 1.1" in text
    assert "<|begin_of_text|>" not in text


def test_export_writes_a_proven_model_with_its_modelfile(tmp_path, lorikit):
    run = save_run(tmp_path / "run", save_model(tmp_path / "base"))
    code, out, err = lorikit("export", run, "--to", "ollama", "-o", tmp_path / "out")
    assert (code, out.strip()) == (0, str(tmp_path / "out")) and "ollama create NAME -f" in err
    assert {"Modelfile", "model.safetensors", "config.json", "tokenizer.json"} <= {
        p.name for p in (tmp_path / "out").iterdir()
    }
    for form, reason in (("gguf", "convert_hf_to_gguf.py"), ("zip", "ollama")):
        code, _, err = lorikit("export", run, "--to", form, "-o", tmp_path / "no")
        assert code == 2 and reason in err


def test_a_refused_template_leaves_no_folder_behind(tmp_path, lorikit):
    run = save_run(tmp_path / "run", save_model(tmp_path / "base"))
    counting = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ loop.index }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    (tmp_path / "t.jinja").write_text(
        counting + "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
    )
    settings = json.loads((run / "config.yaml").read_text())
    settings["data"]["template"] = str(tmp_path / "t.jinja")
    (run / "config.yaml").write_text(json.dumps(settings))
    code, _, err = lorikit("export", run, "--to", "ollama", "-o", tmp_path / "out")
    assert code == 4 and ("frames" in err or "renders" in err)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".staging*"))
