"""What every test gets: the tutorial's data where it is present, GPU tests only where there is a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

settings.register_profile("lorikit", deadline=None, print_blob=True)
settings.load_profile("lorikit")

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tests start processes; a forked tokenizer pool warns


@pytest.fixture(scope="session")
def tutorial_data() -> Path:
    """huanhuan.json, from LORIKIT_TUTORIAL_DATA or beside the repository; it is not ours to ship."""
    path = Path(os.environ.get("LORIKIT_TUTORIAL_DATA", ROOT.parent / "shared" / "data" / "huanhuan.json"))
    if not path.is_file():
        pytest.skip(f"the tutorial's data is not at {path}; name it with LORIKIT_TUTORIAL_DATA")
    return path


@pytest.fixture
def lorikit(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[object, str, str]]:
    """The command line: called with its arguments it gives exit code, stdout and stderr."""
    from lorikit.cli import main

    def run(*arguments: object) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where torch sees none; torch is imported only if such a test was collected."""
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
