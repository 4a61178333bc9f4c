import errno
import json
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorikit.config import TrainConfig
from lorikit.errors import DiskError, ModelError
from lorikit.train import checkpoint
from lorikit.train.adamw import make_optimizer
from lorikit.train.checkpoint import State, newest, prune, read_state, save, verify
from lorikit.train.optim import Budget, take_step
from lorikit.train.storage import disk_errors, new_folder, remove_staged, write_file
from tiny_engine import TinyEngine, tiny_rows


def stepped(num_steps, engine=None, optimizer=None, first=0):
    engine = engine or TinyEngine()
    optimizer = optimizer or make_optimizer(
        engine, TrainConfig(output_dir="run", learning_rate=1e-2, weight_decay=0.01)
    )
    engine.train()
    for step in range(first, first + num_steps):
        rows = tiny_rows(4, seed=step)
        take_step(engine, optimizer, rows, Budget(256, print), dropout_seed=step, learning_rate=1e-2)
    return engine, optimizer


def saved(run, step, **state):
    engine, optimizer = stepped(step)
    return save(run, optimizer.state(), State(step=step, **state), adapter_of(engine))


def adapter_of(engine):
    return lambda folder: save_file(engine.adapter_state(), folder / "adapter_model.safetensors")


def test_a_checkpoint_restores_engine_optimizer_and_state_to_the_bit(tmp_path):
    state = State(step=3, tokens=900, labelled_tokens=400, window_loss=1 / 3, best_loss=0.1 + 0.2, max_tokens=512)
    engine, optimizer = stepped(3)
    folder = save(tmp_path, optimizer.state(), state, adapter_of(engine))
    other = TinyEngine(seed=0)
    fresh = make_optimizer(other, TrainConfig(output_dir="run", learning_rate=1e-2, weight_decay=0.01))
    assert checkpoint.load(folder, other, fresh) == state
    stepped(4, engine, optimizer, first=3)
    stepped(4, other, fresh, first=3)
    for one, two in zip(engine.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_checkpoint_holds_no_pickle_and_lists_every_file_with_its_hash(tmp_path):
    folder = saved(tmp_path, 2)
    names = {path.name for path in folder.iterdir()}
    assert names == {"adapter_model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest.keys() == names - {"manifest.json"}
    moments = load_file(folder / "optimizer.safetensors")
    assert moments["step.base_model.model.head.lora_A.weight"].item() == 2
    assert moments["exp_avg_sq.base_model.model.head.lora_B.weight"].shape == (16, 4)
    assert verify(folder) == []


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_changed_byte_of_any_file_is_found(tmp_path_factory, data):
    folder = saved(tmp_path_factory.mktemp("run"), 1)
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(path.read_bytes())
    if path.name == "manifest.json":
        content = content[: data.draw(st.integers(0, len(content) - 3))]
    else:
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert len(verify(folder)) == 1 and path.name in verify(folder)[0]


def test_a_missing_a_short_and_an_unlisted_file_are_each_named(tmp_path):
    folder = saved(tmp_path, 1)
    (folder / "optimizer.safetensors").unlink()
    with (folder / "state.json").open("a") as file:
        file.write("\n")
    first, second = sorted(verify(folder))
    assert first == "optimizer.safetensors is missing"
    assert second.startswith("state.json has ")
    (folder / "manifest.json").write_text('{"files": {}}')
    assert sorted(verify(folder)) == [
        "adapter_model.safetensors is not listed",
        "optimizer.safetensors is not listed",
        "state.json is not listed",
    ]
    for nonsense in ("[]", "{}", '{"files": 3}', '{"files": {"a": 1}}', "\udcff", '{"files": {"../x": {"size": 1}}}'):
        (folder / "manifest.json").write_text(nonsense, errors="surrogateescape")
        assert len(verify(folder)) == 1 and "cannot be read" in verify(folder)[0]
    shutil.rmtree(folder)
    assert "manifest.json cannot be read" in verify(folder)[0]


def test_the_newest_whole_checkpoint_is_taken_and_damaged_ones_are_named_and_set_aside(tmp_path):
    for step in (2, 9, 10, 11):
        saved(tmp_path, step)
    (tmp_path / "checkpoint-11" / "state.json").unlink()
    (tmp_path / "checkpoint-10" / "manifest.json").write_text("")
    said = []
    assert newest(tmp_path, said.append) == tmp_path / "checkpoint-9"
    assert len(said) == 2 and "checkpoint-11: state.json is missing" in said[0] and "checkpoint-10" in said[1]
    assert {p.name for p in tmp_path.iterdir()} == {
        "checkpoint-2",
        "checkpoint-9",
        "damaged-checkpoint-10",
        "damaged-checkpoint-11",
    }


def test_only_damaged_checkpoints_are_an_error_and_none_at_all_a_beginning(tmp_path):
    assert newest(tmp_path, print) is None
    folder = saved(tmp_path, 1)
    (folder / "state.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"none of its 1 checkpoints is whole .*state\.json.*delete them to start over"
    ):
        newest(tmp_path, print)
    assert folder.exists()


@pytest.mark.parametrize(
    ("limit", "keep", "left"),
    [(2, [None], [3, 4]), (1, [1], [1, 4]), (None, [], [1, 2, 3, 4]), (9, [], [1, 2, 3, 4]), (2, [4], [3, 4])],
)
def test_old_checkpoints_go_but_never_the_best_or_the_newest(tmp_path, limit, keep, left):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-final").mkdir()
    prune(tmp_path, limit, keep)
    assert {p.name for p in tmp_path.iterdir()} == {f"checkpoint-{step}" for step in left} | {"checkpoint-final"}


def test_a_state_of_a_newer_version_is_refused(tmp_path):
    folder = saved(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"num_gpus": 8}))
    with pytest.raises(ModelError, match=r"another version of lorikit \(num_gpus\)"):
        read_state(folder)


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    folder = saved(tmp_path, 1)
    tensors = load_file(folder / "optimizer.safetensors")
    engine = TinyEngine()
    optimizer = make_optimizer(engine, TrainConfig(output_dir="run"))
    save_file(tensors | {"exp_avg.other": torch.zeros(1)}, folder / "optimizer.safetensors")
    with pytest.raises(ModelError, match="damaged"):
        checkpoint.load(folder, engine, optimizer)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["optimizer.safetensors"] = {
        "size": (folder / "optimizer.safetensors").stat().st_size,
        "sha256": checkpoint._sha256(folder / "optimizer.safetensors"),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match=r"no parameter for exp_avg\.other"):
        checkpoint.load(folder, engine, optimizer)


def small_disk(path):
    """A mounted file system of 64 KiB, or None where mounting is not permitted."""
    path.mkdir()
    return path if os.system(f"mount -t tmpfs -o size=64k none {path} 2>/dev/null") == 0 else None


def test_a_full_disk_is_a_disk_error_that_leaves_the_last_checkpoint_whole(tmp_path):
    run = small_disk(tmp_path / "small")
    if run is None:
        pytest.skip("mounting a file system is not permitted here")
    try:
        first = saved(run, 1)
        engine, optimizer = stepped(2)
        (run / "filler").write_bytes(b"x" * (shutil.disk_usage(run).free - 8192))
        with pytest.raises(DiskError, match=r"checkpoint-2 cannot be written.*[Nn]o space left"):
            save(run, optimizer.state(), State(step=2), adapter_of(engine))
        assert verify(first) == []
        with pytest.raises(DiskError, match="No space left"):
            write_file(run / "config.yaml", b"x" * 20_000)
        assert {p.name for p in run.iterdir()} == {"checkpoint-1", "filler"}
    finally:
        os.system(f"umount {run}")


def test_a_limit_on_the_size_of_files_is_a_disk_error_without_a_trace(tmp_path):
    engine, optimizer = stepped(1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))
    try:
        with pytest.raises(DiskError, match=r"checkpoint-1 cannot be written: .*[Ff]ile too large"):
            save(tmp_path, optimizer.state(), State(step=1), adapter_of(engine))
        with pytest.raises(DiskError, match="File too large"):
            write_file(tmp_path / "config.yaml", b"x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_file_and_an_error_of_ours_is_not_renamed(tmp_path):
    write_file(tmp_path / "a", b"old")
    with pytest.raises(DiskError, match="Read-only file system"), disk_errors(tmp_path):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(KeyError), new_folder(tmp_path / "b") as staged:
        (staged / "half").write_text("x")
        raise KeyError
    write_file(tmp_path / "a", b"new")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"a": b"new"}


def test_a_new_folder_takes_the_place_of_the_old_one_and_leftovers_are_removed(tmp_path):
    for content in ("one", "two"):
        with new_folder(tmp_path / "adapter") as staged:
            (staged / "file").write_text(content)
            assert not (tmp_path / "adapter").exists() or (tmp_path / "adapter" / "file").read_text() == "one"
    assert (tmp_path / "adapter" / "file").read_text() == "two"
    (tmp_path / ".staging-checkpoint-7").mkdir()
    (tmp_path / ".staging-checkpoint-7" / "half").touch()
    (tmp_path / ".staging-config.yaml").touch()
    remove_staged(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_others_can_read_what_the_umask_lets_them_read(tmp_path):
    for umask, mode in ((0o022, 0o644), (0o077, 0o600)):
        (tmp_path / oct(umask)).mkdir()
        before = os.umask(umask)
        try:
            folder = saved(tmp_path / oct(umask), 1)
        finally:
            os.umask(before)
        assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {mode}


def test_every_field_of_the_state_survives_json(tmp_path):
    state = State(1, False, 2, 3, 4.5, 1e-9, 6, 7, 0.1, 8, 1 / 3, 9, 10, 11, "abc", "main")
    engine, optimizer = stepped(1)
    assert read_state(save(tmp_path, optimizer.state(), state, adapter_of(engine))) == state
    assert replace(state, step=2) != state
