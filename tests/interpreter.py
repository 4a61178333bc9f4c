"""A test file once more, in a process in which Triton's interpreter runs the kernels on CPU tensors."""

import os
import subprocess
import sys


def assert_passes_in_the_interpreter(file):
    """All tests of a file that has some; its own call of this is to be skipped there."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n0", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
