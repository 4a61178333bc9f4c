"""Models and data from paths and from both hubs, with the real client libraries against servers on loopback."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from hub_servers import Hub
from lorikit.errors import DataError, DiskError, ModelError
from lorikit.hub import resolve_data, resolve_model
from lorikit.model_files import needed_data, needed_files, safetensors_problem

HUBS = ["hf", "ms"]
NAMES = {"hf": "huggingface", "ms": "modelscope"}
BRANCH = {"hf": "main", "ms": "master"}


def safetensors(size: int, fill: bytes = b"\1") -> bytes:
    """A safetensors file with one tensor of `size` bytes."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + fill * size


def model_files(size: int = 1000, fill: bytes = b"\1") -> dict[str, bytes]:
    """A repository like those on the hubs: what a model needs, and much that it does not."""
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "tokenizer_config.json": b"{}",
        "chat_template.jinja": b"{{ messages }}",
        "modeling_own.py": b"print('never run')",
        "model.safetensors": safetensors(size, fill),
        "pytorch_model.bin": b"a pickle",
        "model-Q4.gguf": b"GGUF",
        "original/consolidated.00.pth": b"a pickle",
        "onnx/model.onnx": b"onnx",
        "README.md": b"# card",
    }


NEEDED = [
    "chat_template.jinja",
    "config.json",
    "model.safetensors",
    "modeling_own.py",
    "tokenizer.json",
    "tokenizer_config.json",
]


class Machine:
    """A user's machine: its own home and caches, and an environment that points both hubs where a test says."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "LORIKIT_CACHE": str(home / "lorikit"),
            "HF_HOME": str(home / "hf"),
            "HF_ENDPOINT": "http://127.0.0.1:9",  # the discard port: nobody answers
            "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9",
            "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def point(self, prefix: str, hub: Hub) -> Machine:
        self.environment["HF_ENDPOINT" if prefix == "hf" else "MODELSCOPE_ENDPOINT"] = hub.url
        return self

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lorikit", "download", *arguments, "--json"]
        return subprocess.Popen(
            command, env=self.environment, cwd=self.home, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def download(self, *arguments: str) -> dict[str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return {**json.loads(out), "stderr": err}

    def refused(self, *arguments: str, code: int = ModelError.exit_code) -> str:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (code, ""), err
        assert "Traceback" not in err
        return err


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def hub() -> Hub:
    with Hub() as running:
        yield running


def files_of(found: dict[str, str]) -> list[str]:
    folder = Path(found["path"])
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("prefix", HUBS)
def test_only_the_files_that_a_model_needs_are_downloaded_at_a_commit(machine, hub, prefix):
    commit = hub.add("own/tiny", model_files(), BRANCH[prefix])
    found = machine.point(prefix, hub).download(f"{prefix}:own/tiny")
    assert (found["name"], found["hub"], found["revision"]) == ("own/tiny", NAMES[prefix], commit)
    assert files_of(found) == NEEDED
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == model_files()["model.safetensors"]
    assert len(found["stderr"].splitlines()) == 1  # that it downloads; no bars where there is no terminal


@pytest.mark.parametrize("prefix", HUBS)
def test_on_a_terminal_the_librarys_bars_are_shown(machine, hub, prefix):
    hub.add("own/tiny", model_files(), BRANCH[prefix])
    terminal, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    command = [sys.executable, "-m", "lorikit", "download", f"{prefix}:own/tiny"]
    environment = machine.point(prefix, hub).environment
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=side)
    os.close(side)
    shown = b""
    try:
        while piece := os.read(terminal, 2**16):
            shown += piece
    except OSError:  # how Linux says that the other side is closed
        pass
    assert process.wait() == 0 and b"/6 [" in shown, shown


@pytest.mark.parametrize("prefix", HUBS)
def test_a_second_call_downloads_nothing_and_a_commit_asks_nothing(machine, hub, prefix):
    commit = hub.add("own/tiny", model_files(), BRANCH[prefix])
    first = machine.point(prefix, hub).download(f"{prefix}:own/tiny")
    hub.log.clear()
    again = machine.download(f"{prefix}:own/tiny")
    assert (again["path"], again["revision"], again["stderr"]) == (first["path"], commit, "")
    assert hub.asked("model.safetensors") == []
    hub.log.clear()
    assert machine.download(f"{prefix}:own/tiny", "--revision", commit)["path"] == first["path"]
    assert hub.log == []


@pytest.mark.parametrize("prefix", HUBS)
def test_a_copy_that_an_older_version_took_with_fewer_files_is_completed(machine, hub, prefix):
    commit = hub.add("own/tiny", model_files(), BRANCH[prefix])
    folder = Path(machine.point(prefix, hub).download(f"{prefix}:own/tiny")["path"])
    (folder / "modeling_own.py").unlink()
    for note in machine.home.glob("lorikit/hub/**/*.json"):
        old = json.loads(note.read_text())
        del old["files"]["modeling_own.py"]
        note.write_text(json.dumps(old))
    found = machine.download(f"{prefix}:own/tiny")
    assert (found["revision"], files_of(found)) == (commit, NEEDED)


@pytest.mark.parametrize("prefix", HUBS)
def test_a_branch_that_moved_is_another_revision_and_the_old_commit_stays(machine, hub, prefix):
    old = hub.add("own/tiny", model_files(fill=b"\1"), BRANCH[prefix])
    first = machine.point(prefix, hub).download(f"{prefix}:own/tiny")
    new = hub.add("own/tiny", model_files(fill=b"\2"), BRANCH[prefix])
    second = machine.download(f"{prefix}:own/tiny")
    pinned = machine.download(f"{prefix}:own/tiny", "--revision", old)
    assert (second["revision"], pinned["revision"]) == (new, old)
    assert pinned["path"] == first["path"] != second["path"]
    assert (Path(pinned["path"]) / "model.safetensors").read_bytes()[-1] == 1


def test_a_tag_is_pinned_to_its_commit(machine, hub):
    commit = hub.add("own/tiny", model_files(), "v1.0")
    hub.add("own/tiny", model_files(fill=b"\2"), "main")
    assert machine.point("hf", hub).download("hf:own/tiny", "--revision", "v1.0")["revision"] == commit


def test_on_modelscope_a_branch_whose_last_commit_changed_none_of_its_files_is_named_by_the_branch(machine, hub):
    hub.add("own/tiny", model_files() | {"old.json": b"{}"}, "master")
    hub.add("own/tiny", model_files(), "master")  # a file removed: no file's own commit lists the files as they are now
    assert machine.point("ms", hub).download("ms:own/tiny")["revision"] == "master"


@pytest.mark.parametrize(("prefix", "resumed_from"), [("hf", 20 * 2**20), ("ms", 22 * 2**20)])
def test_a_connection_cut_in_the_middle_of_a_file_is_resumed_from_there(machine, hub, prefix, resumed_from):
    files = model_files(24 * 2**20)
    hub.add("own/tiny", files, BRANCH[prefix])
    hub.cut_after["model.safetensors"] = 22 * 2**20 + 1000
    found = machine.point(prefix, hub).download(f"{prefix}:own/tiny")
    assert (Path(found["path"]) / "model.safetensors").read_bytes() == files["model.safetensors"]
    whole, rest = hub.asked("model.safetensors")
    start = int(re.fullmatch(r"bytes=(\d+)-\d*", rest).group(1))
    assert whole == "" and start >= resumed_from


@pytest.mark.parametrize("prefix", HUBS)
def test_the_same_command_finishes_a_download_whose_process_was_killed(machine, hub, prefix):
    hub.add("own/tiny", model_files(8 * 2**20), BRANCH[prefix])
    hub.stall_after["model.safetensors"] = 5 * 2**20
    process = machine.point(prefix, hub).start(f"{prefix}:own/tiny")
    assert hub.stalled.wait(60)
    deadline = time.monotonic() + 30
    while not (list(machine.home.rglob("tokenizer.json")) and list(machine.home.rglob("config.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)  # let it write what it has
    process.send_signal(signal.SIGKILL)
    process.communicate()
    hub.log.clear()
    found = machine.download(f"{prefix}:own/tiny")
    assert files_of(found) == NEEDED
    assert hub.asked("tokenizer.json") == []  # whole files stay
    if prefix == "ms":  # and of a part what was written; huggingface_hub 2 keeps no parts
        assert re.fullmatch(r"bytes=[1-9]\d+-", hub.asked("model.safetensors")[0])


@pytest.mark.parametrize("prefix", HUBS)
def test_an_id_that_is_not_there_is_one_error_that_says_where_it_was_looked_for(machine, hub, prefix):
    text = machine.point(prefix, hub).refused(f"{prefix}:own/none")
    assert f"own/none cannot be had. {NAMES[prefix]} ({hub.url}): no such model, or a private one" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("prefix", HUBS)
def test_a_revision_that_is_not_there_is_named(machine, hub, prefix):
    hub.add("own/tiny", model_files(), BRANCH[prefix])
    text = machine.point(prefix, hub).refused(f"{prefix}:own/tiny", "--revision", "v9")
    assert "revision v9" in text


@pytest.mark.parametrize(("prefix", "variable"), [("hf", "HF_TOKEN"), ("ms", "MODELSCOPE_API_TOKEN")])
def test_a_gated_model_says_where_to_ask_and_opens_with_the_token(machine, hub, prefix, variable):
    hub.add("own/gated", model_files(), BRANCH[prefix])
    hub.needs_token = "hf_secret"
    text = machine.point(prefix, hub).refused(f"{prefix}:own/gated")
    assert variable in text and f"{hub.url}" in text and "own/gated" in text
    machine.environment[variable] = "hf_secret"
    assert files_of(machine.download(f"{prefix}:own/gated")) == NEEDED


@pytest.mark.parametrize("prefix", HUBS)
def test_bytes_that_do_not_have_the_listed_sha256_are_refused_and_not_kept(machine, hub, prefix):
    hub.add("own/tiny", model_files(), BRANCH[prefix])
    hub.altered["model.safetensors"] = safetensors(1000, b"\7")
    text = machine.point(prefix, hub).refused(f"{prefix}:own/tiny")
    assert "it sent other bytes than it lists" in text and "model.safetensors" in text
    assert not [path for path in machine.home.rglob("*") if path.is_file() and path.read_bytes().endswith(b"\7\7")]
    hub.altered.clear()
    assert files_of(machine.download(f"{prefix}:own/tiny")) == NEEDED


@pytest.mark.parametrize("prefix", HUBS)
def test_a_file_of_another_size_than_listed_is_refused(machine, hub, prefix):
    hub.add("own/tiny", model_files(), BRANCH[prefix])
    hub.listed_size["model.safetensors"] = 5000
    text = machine.point(prefix, hub).refused(f"{prefix}:own/tiny")
    assert "it sent other bytes than it lists" in text and "model.safetensors" in text and "5000" in text


@pytest.mark.parametrize("prefix", HUBS)
@pytest.mark.parametrize("damage", ["cut off", "changed", "gone"])
def test_a_damaged_file_in_the_cache_is_noticed_and_downloaded_again(machine, hub, prefix, damage):
    commit = hub.add("own/tiny", model_files(), BRANCH[prefix])
    weights = Path(machine.point(prefix, hub).download(f"{prefix}:own/tiny")["path"]) / "model.safetensors"
    whole = weights.read_bytes()
    blob = weights.resolve()
    if damage == "gone":
        blob.unlink()
    else:
        blob.write_bytes(whole[:-1] if damage == "cut off" else whole[:-1] + b"\7")
    for arguments in ([f"{prefix}:own/tiny"], [f"{prefix}:own/tiny", "--revision", commit]):
        found = machine.download(*arguments)
        assert (Path(found["path"]) / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("prefix", HUBS)
def test_a_damaged_file_in_the_cache_is_an_error_where_it_cannot_be_downloaded_again(machine, hub, prefix):
    commit = hub.add("own/tiny", model_files(), BRANCH[prefix])
    weights = Path(machine.point(prefix, hub).download(f"{prefix}:own/tiny")["path"]) / "model.safetensors"
    weights.resolve().write_bytes(weights.read_bytes()[:-1] + b"\7")
    machine.environment["HF_HUB_OFFLINE"] = "1"
    for arguments in ([f"{prefix}:own/tiny"], [f"{prefix}:own/tiny", "--revision", commit]):
        assert "is not whole: model.safetensors has another sha256" in machine.refused(*arguments)


@pytest.mark.parametrize("prefix", HUBS)
def test_a_full_disk_is_noticed_before_the_download_starts(machine, hub, prefix):
    hub.add("own/huge", model_files(), BRANCH[prefix])
    hub.listed_size["model.safetensors"] = 2**60
    text = machine.point(prefix, hub).refused(f"{prefix}:own/huge", code=DiskError.exit_code)
    assert re.search(r"own/huge needs 1073741824\.0 GiB in .*, \d+\.\d GiB are free", text)
    assert hub.asked("config.json") == hub.asked("model.safetensors") == []


@pytest.mark.parametrize("prefix", HUBS)
def test_without_network_the_error_says_so_and_what_was_downloaded_still_serves(machine, hub, prefix):
    text = machine.refused(f"{prefix}:own/tiny")
    assert "cannot be reached" in text and "no copy is in" in text
    commit = hub.add("own/tiny", model_files(), BRANCH[prefix])
    first = machine.point(prefix, hub).download(f"{prefix}:own/tiny")
    machine.environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "MODELSCOPE_ENDPOINT": "http://127.0.0.1:9"}
    assert machine.download(f"{prefix}:own/tiny")["path"] == first["path"]
    assert machine.download("own/tiny")["revision"] == commit


def test_with_hf_hub_offline_no_request_is_made(machine, hub):
    hub.add("own/tiny", model_files())
    machine.point("hf", hub).environment["HF_HUB_OFFLINE"] = "1"
    assert "HF_HUB_OFFLINE is set" in machine.refused("hf:own/tiny")
    assert hub.log == []


def test_what_the_hubs_own_tool_downloaded_serves_without_network(machine, hub):
    commit = hub.add("own/tiny", model_files())
    tool = "from huggingface_hub import snapshot_download as get; get('own/tiny', allow_patterns=['*.json', '*.safetensors'])"
    subprocess.run(
        [sys.executable, "-c", tool], env=machine.point("hf", hub).environment, check=True, capture_output=True
    )
    machine.environment["HF_HUB_OFFLINE"] = "1"
    found = machine.download("own/tiny")
    assert (found["revision"], found["hub"]) == (commit, "huggingface")


def test_a_branch_folder_of_modelscopes_own_tool_is_used_as_it_is_when_it_is_right(machine, hub):
    commit = hub.add("own/tiny", model_files(), "master")
    tool = "from modelscope_hub import HubApi; print(HubApi().download_repo('own/tiny', 'model'))"
    done = subprocess.run(
        [sys.executable, "-c", tool],
        env=machine.point("ms", hub).environment,
        check=True,
        capture_output=True,
        text=True,
    )
    hub.log.clear()
    found = machine.download("ms:own/tiny")
    assert (found["path"], found["revision"]) == (done.stdout.strip().splitlines()[-1], commit)
    assert hub.asked("model.safetensors") == []


def test_a_bare_id_asks_modelscope_first_where_its_cache_is_set_and_then_the_other(machine, hub):
    hub.add("own/tiny", model_files(), "main")
    hub.repos["own/tiny"].refs["master"] = hub.repos["own/tiny"].refs["main"]
    machine.point("hf", hub).point("ms", hub)
    assert machine.download("own/tiny")["hub"] == "huggingface"
    machine.environment["MODELSCOPE_CACHE"] = str(machine.home / "ms")
    found = machine.download("own/tiny")
    assert found["hub"] == "modelscope" and found["path"].startswith(str(machine.home / "ms"))
    with Hub() as empty:
        machine.point("ms", empty).environment["LORIKIT_CACHE"] = str(machine.home / "fresh")
        found = machine.download("own/tiny")
    assert found["hub"] == "huggingface"
    assert "not from modelscope" in found["stderr"]


def test_a_bare_id_that_neither_hub_has_names_both(machine, hub):
    machine.point("hf", hub)
    text = machine.refused("own/none")
    assert "huggingface (" in text and "no such model" in text
    assert "modelscope (http://127.0.0.1:9): cannot be reached" in text
    assert "no file or folder own/none here either" in text


def test_the_setting_hub_keeps_a_bare_id_to_that_hub(machine, hub):
    machine.point("hf", hub).point("ms", hub)
    assert "huggingface" not in machine.refused("own/none", "--hub", "modelscope")


def test_without_modelscopes_library_the_error_names_the_command(machine, hub, tmp_path):
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError('not here')")
    machine.point("ms", hub).environment["PYTHONPATH"] = str(tmp_path)
    assert "pip install 'lorikit[modelscope]'" in machine.refused("ms:own/tiny")


@pytest.mark.parametrize("status", [403, 500, 503])
@pytest.mark.parametrize("prefix", HUBS)
def test_a_hub_that_answers_nonsense_is_one_error(machine, hub, prefix, status):
    hub.status = status
    machine.environment |= {"MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1"}
    text = machine.point(prefix, hub).refused(f"{prefix}:own/tiny")
    assert hub.url in text and len(text.splitlines()) == 1


def test_only_pickles_are_refused_before_anything_is_downloaded(machine, hub):
    hub.add("own/old", {"config.json": b"{}", "pytorch_model.bin": b"x", "tokenizer.json": b"{}"})
    text = machine.point("hf", hub).refused("hf:own/old")
    assert "own/old: its weights are pickles (pytorch_model.bin)" in text
    assert hub.asked("config.json") == []


def test_an_adapter_repository_says_that_it_is_one(machine, hub):
    hub.add("own/lora", {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors(9)})
    assert "an adapter, not a model" in machine.point("hf", hub).refused("hf:own/lora")


@pytest.mark.parametrize("prefix", HUBS)
def test_a_data_set_gives_its_data_files_or_the_one_that_is_named(machine, hub, prefix):
    files = {
        "data/train.jsonl": b"{}\n",
        "data/test.jsonl": b"{}\n",
        "rows.parquet": b"PAR1",
        "README.md": b"",
        "a.py": b"",
    }
    commit = hub.add("datasets/own/rows", files, BRANCH[prefix])
    found = machine.point(prefix, hub).download(f"{prefix}:own/rows", "--data")
    assert (found["hub"], found["revision"]) == (NAMES[prefix], commit)
    assert files_of(found) == ["data/test.jsonl", "data/train.jsonl", "rows.parquet"]
    one = machine.download(f"{prefix}:own/rows/data/train.jsonl", "--data")
    assert Path(one["path"]).read_bytes() == b"{}\n" and one["path"].endswith("data/train.jsonl")
    text = machine.refused(f"{prefix}:own/rows/none.json", "--data", code=DataError.exit_code)
    assert "no data file called none.json" in text and "data/train.jsonl" in text


def test_part_of_a_data_set_is_not_taken_for_the_whole_without_network(machine, hub):
    hub.add("datasets/own/rows", {"a.jsonl": b"{}\n", "b.jsonl": b"{}\n"})
    part = machine.point("hf", hub).download("own/rows/a.jsonl", "--data")
    machine.environment["HF_HUB_OFFLINE"] = "1"
    assert machine.download("own/rows/a.jsonl", "--data")["path"] == part["path"]
    assert "no copy is in" in machine.refused("own/rows", "--data")


def test_a_data_set_with_a_single_file_is_that_file(machine, hub):
    hub.add("datasets/own/rows", {"rows.json": b"[]", ".gitattributes": b""})
    assert machine.point("hf", hub).download("own/rows", "--data")["path"].endswith("rows.json")


def test_two_processes_download_the_same_model_at_once(machine, hub):
    hub.add("own/tiny", model_files(4 * 2**20))
    both = [machine.point("hf", hub).start("hf:own/tiny") for _ in range(2)]
    paths = {json.loads(process.communicate(timeout=120)[0])["path"] for process in both}
    assert len(paths) == 1 and files_of({"path": paths.pop()}) == NEEDED


# Paths


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


SHARDED = {
    "config.json": b"{}",
    "tokenizer.model": b"x",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": safetensors(5),
    "model-00002-of-00002.safetensors": safetensors(6),
}


@pytest.mark.parametrize("files", [model_files(), SHARDED])
def test_a_model_folder_is_taken_as_it_is(tmp_path, files):
    folder = write(tmp_path / "model", files)
    found = resolve_model(str(folder))
    assert (found.path, found.name, found.hub, found.revision) == (folder, str(folder), "path", None)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model-00002-of-00002.safetensors": None}, "model-00002-of-00002.safetensors is missing"),
        ({"model-00002-of-00002.safetensors": safetensors(6)[:-2]}, "is cut off or damaged: "),
        ({"model-00002-of-00002.safetensors": safetensors(6) + b"x"}, "is cut off or damaged: "),
        ({"model-00002-of-00002.safetensors": b""}, "is not a whole safetensors file"),
        (
            {"model-00002-of-00002.safetensors": (9).to_bytes(8, "little") + b"no header"},
            "a damaged safetensors header",
        ),
        ({"model-00002-of-00002.safetensors": b"version https://git-lfs.github.com/spec/v1\n"}, "run git lfs pull"),
        ({"model.safetensors.index.json": b"{"}, "model.safetensors.index.json: cannot be read"),
        ({"model.safetensors.index.json": b"{}"}, "names no weights"),
        ({"tokenizer.model": None}, "no tokenizer"),
        ({"config.json": b"[]"}, "a mapping is expected"),
        ({"config.json": None}, "no config.json beside the weights"),
        (
            dict.fromkeys([n for n in SHARDED if n.startswith("model")]) | {"pytorch_model.bin": b""},
            "weights are pickles",
        ),
        (dict.fromkeys([n for n in SHARDED if n.startswith("model")]) | {"x.gguf": b""}, "only GGUF files"),
        (dict.fromkeys(SHARDED), "found nothing"),
        (
            dict.fromkeys(SHARDED) | {"adapter_config.json": b'{"base_model_name_or_path": "own/base"}'},
            "its base (own/base)",
        ),
        (dict.fromkeys(SHARDED) | {"adapter/adapter_config.json": b"{}"}, "an adapter, not a model"),
    ],
)
def test_a_folder_that_is_no_whole_model_says_what_is_wrong(tmp_path, change, complaint):
    tmp_path.joinpath("model").mkdir()
    folder = write(tmp_path / "model", {n: c for n, c in (SHARDED | change).items() if c is not None})
    with pytest.raises(ModelError, match=re.escape(complaint)):
        resolve_model(str(folder))


def test_all_that_is_wrong_with_a_folder_is_said_at_once(tmp_path):
    folder = write(tmp_path, {"config.json": b"{}", "model.safetensors": b"x"})
    with pytest.raises(ModelError, match=r"model\.safetensors is not a whole .*; no tokenizer"):
        resolve_model(str(folder))


@pytest.mark.parametrize("name", ["./none", "/none/at/all", "none", "a\\b", "none/", "~none/x", "", "a/b/c", " "])
def test_a_path_that_is_not_there_is_an_error_without_asking_a_hub(name):
    with pytest.raises(ModelError):
        resolve_model(name)


@pytest.mark.parametrize("name", ["rows.json", "data/rows.jsonl", "./none/rows"])
def test_a_data_path_that_is_not_there_is_an_error_without_asking_a_hub(name):
    with pytest.raises((DataError, ModelError), match="no such file or folder"):
        resolve_data(name)


def test_a_name_too_long_for_a_path_is_refused():
    with pytest.raises(ModelError, match="no usable path"):
        resolve_model("x" * 5000)


@pytest.mark.parametrize("name", ["hf:", "ms:a/b/c", "hf:../etc"])
def test_an_impossible_id_is_refused(name):
    with pytest.raises(ModelError, match="owner/name"):
        resolve_model(name)


def test_a_file_is_no_model_and_a_path_has_no_revision(tmp_path):
    write(tmp_path, model_files())
    with pytest.raises(ModelError, match="a model is a folder"):
        resolve_model(str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match="set only one of the two"):
        resolve_model(str(tmp_path), revision="main")


def test_data_may_be_a_file_or_a_folder(tmp_path):
    file = write(tmp_path, {"rows.json": b"[]"}) / "rows.json"
    assert resolve_data(str(file)).path == file
    assert resolve_data(str(tmp_path)).path == tmp_path


def test_weights_are_downloaded_once_where_a_repository_holds_them_in_several_formats():
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    beside = ["config.json", "model.safetensors.index.json", "tokenizer.json"]
    names = [*shards, *beside, "consolidated.safetensors", "metal/model.safetensors", "model.fp16.safetensors"]
    assert needed_files(names, "x") == sorted([*shards, *beside])
    assert "model.safetensors" in needed_files([*names, "model.safetensors"], "x")
    assert shards[0] not in needed_files([*names, "model.safetensors"], "x")


def test_hidden_files_are_no_data():
    assert needed_data([".cache/x.json", "a.json.gz", "b.txt"], "", "x") == ["a.json.gz"]


def test_a_safetensors_file_as_the_library_writes_it_has_no_problem(tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"a": torch.ones(3), "b": torch.ones(0)}, tmp_path / "a.safetensors", metadata={"format": "pt"})
    assert safetensors_problem(tmp_path / "a.safetensors") is None


def test_an_address_that_never_answers_is_given_up_on(monkeypatch):
    from lorikit.hub_clients import unreachable

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        before = time.monotonic()
        assert unreachable("huggingface", timeout=0.3)
        assert time.monotonic() - before < 2
