"""The chat as a user meets it: a process of its own, once at the end of a pipe and once on a terminal."""

import hashlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tiny_model import save_model, save_run

pytestmark = pytest.mark.slow
STEERING = re.compile(r"\033\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_run(folder / "run", save_model(folder / "base", longest=20000))
    return folder


def environment(**extra):
    # The tests' own folder is no part of the path, and colours depend on the terminal alone.
    return (
        {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")} | {"OMP_NUM_THREADS": "1"} | extra
    )


def command(verb, run, *flags):
    return [sys.executable, "-m", "lorikit", verb, str(run), "--greedy", *flags]


def pipe(verb, run, *flags, text="", **extra):
    return subprocess.run(
        command(verb, run, *flags), input=text.encode(), capture_output=True, env=environment(**extra), timeout=120
    )


class Terminal:
    """A process on a terminal of its own, of which it is the foreground job: Ctrl-C reaches it as a signal."""

    def __init__(self, *arguments, **extra):
        self.screen, inner = pty.openpty()
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *arguments],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=environment(TERM="xterm", **extra),
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job would ignore it
        )
        os.close(inner)
        self.raw = b""  # not yet asked about
        self.everything = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def press(self, keys):
        os.write(self.screen, keys.encode())

    def wait_for(self, pattern, seconds=60):
        """Read until the regular expression is on the screen; gives what was read, and forgets it."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text(), re.DOTALL)):
            assert time.monotonic() < deadline, f"no {pattern!r} on the screen: {self.text()!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    read = os.read(self.screen, 65536)
                except OSError:  # what Linux says when the process has gone
                    raise AssertionError(f"ended without {pattern!r}: {self.text()!r}") from None
                self.raw += read
                self.everything += read
        shown = self.text()[: found.end()]
        self.raw = b""
        return shown

    def text(self):
        return STEERING.sub("", self.raw.decode(errors="replace")).replace("\r\n", "\n")


def test_a_piped_chat_answers_line_by_line_without_colours(folder):
    done = pipe("chat", folder / "run", "--max-new-tokens", "5", text="hello\n\n/reset\nhello\n", FORCE_COLOR="1")
    assert done.returncode == 0, done.stderr.decode()
    assert b"\033" not in done.stdout
    answer, rest = done.stdout[: len(done.stdout) // 2], done.stdout[len(done.stdout) // 2 :]
    assert answer == rest
    assert answer.endswith(b"\n")
    alone = pipe("generate", folder / "run", "--prompt", "hello", "--max-new-tokens", "5", "--json")
    assert json.loads(alone.stdout)[0]["answer"] + "\n" == answer.decode()


def test_a_piped_chat_ends_with_the_code_of_its_error(folder):
    for text, code, said in (("/nonsense\n", 2, "unknown command /nonsense"), ("x" * 21000, 3, "takes 20000")):
        done = pipe("chat", folder / "run", text=text)
        assert done.returncode == code
        assert said in done.stderr.decode()
        assert "Traceback" not in done.stderr.decode()
    assert pipe("chat", folder / "typo").returncode == 4


def test_an_unfinished_run_says_from_which_checkpoint_it_answers(folder, tmp_path):
    checkpoint = shutil.copytree(folder / "run", tmp_path / "run") / "checkpoint-7"
    (tmp_path / "run" / "adapter").rename(checkpoint)
    files = {file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()} for file in checkpoint.iterdir()}
    (checkpoint / "manifest.json").write_text(json.dumps({"files": files}))
    done = pipe("generate", tmp_path / "run", "--prompt", "hello", "--max-new-tokens", "3", "--json")
    assert "this is its checkpoint-7" in done.stderr.decode()
    assert json.loads(done.stdout)[0]["tokens"] == 3


def test_a_piped_chat_takes_bytes_that_are_no_text_and_a_reader_that_leaves(folder):
    program = f"printf 'a\\377b\\nhello\\n' | {' '.join(command('chat', folder / 'run', '--max-new-tokens', '9'))} | head -c 1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", program], capture_output=True, env=environment(), timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"Traceback" not in done.stderr


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(folder):
    with Terminal(*command("chat", folder / "run", "--max-new-tokens", "15000")) as terminal:
        terminal.wait_for("help lists the commands.*> ")
        for _ in range(2):
            terminal.press("tell me everything\n")
            terminal.wait_for("everything\n.{20}")
            terminal.press("\x03")
            terminal.wait_for(r"tokens/s, stopped\n+> ")
        terminal.press("/reset\n")
        terminal.wait_for("forgotten.*> ")
        terminal.press("/nonsense\n")
        terminal.wait_for("unknown command /nonsense.*> ")
        terminal.press("\x04")
        assert terminal.process.wait(20) == 0


def test_on_a_terminal_ctrl_c_at_the_prompt_leaves_with_0(folder):
    with Terminal(*command("chat", folder / "run")) as terminal:
        terminal.wait_for("> ")
        terminal.press("half a quest")
        terminal.wait_for("half a quest")
        time.sleep(0.5)  # readline looks for signals only while it waits for a key
        terminal.press("\x03")
        assert terminal.process.wait(20) == 0
        assert "Traceback" not in terminal.text()


def test_pasted_lines_are_one_question(folder):
    with Terminal(*command("chat", folder / "run", "--max-new-tokens", "5")) as terminal:
        terminal.wait_for("> ")
        terminal.press("\033[200~one\ntwo\nthree\033[201~\n")
        terminal.wait_for("tokens/s.*> ")
        terminal.press("/exit\n")
        assert terminal.process.wait(20) == 0
        assert terminal.everything.count(b"tokens/s") == 1


@pytest.mark.parametrize("no_color", ["", "1"])
def test_an_answer_cannot_steer_the_terminal_and_no_color_is_respected(folder, no_color):
    written = pipe("generate", folder / "run", "--prompt", "hello", "--max-new-tokens", "200").stdout
    assert re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", written), "this model was chosen because it does not behave"
    with Terminal(*command("chat", folder / "run", "--max-new-tokens", "200"), NO_COLOR=no_color) as terminal:
        terminal.wait_for("> ")
        terminal.press("hello\n")
        terminal.wait_for("tokens/s.*> ")
        everything = terminal.everything.replace(b"\r\n", b"\n")
    answer = everything.partition(b"hello\n")[2].partition(b"200 tokens")[0]
    own = rb"\033\[\?2004[hl]\r?|\033\[[0-9;]*m"  # readline's paste mode; our dim remark behind the answer
    assert not re.search(rb"[\x00-\x08\x0b-\x1f\x7f]", re.sub(own, b"", answer))
    assert bool(re.search(rb"\033\[[0-9;]*[12]m", everything)) == (not no_color)
