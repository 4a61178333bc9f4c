import io
import sys
from dataclasses import replace

import pytest

from lorikit.data.encode import Encoder
from lorikit.data.values import Message
from lorikit.errors import ConfigError, DataError
from lorikit.infer.chat import COMMANDS, chat
from lorikit.infer.generate import answer
from lorikit.infer.session import open_run
from lorikit.model.engine import Sampling
from tiny_model import save_model, save_run

GREEDY = Sampling(max_new_tokens=8, temperature=0.0, top_p=1.0, repetition_penalty=1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    save_run(folder / "run", save_model(folder / "base"))
    return folder


@pytest.fixture(scope="module")
def session(folder):
    return open_run(folder / "run", device="cpu")


@pytest.fixture
def say(monkeypatch, capsys):
    """Pipe lines into a chat; gives what it wrote to stdout and to stderr."""

    def run(session, *lines, sampling=GREEDY):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        chat(session, sampling)
        return capsys.readouterr()

    return run


def expected(session, *turns, sampling=GREEDY):
    """The answer to alternating turns, of which the last is the question."""
    messages = [Message("assistant" if i % 2 else "user", text) for i, text in enumerate(turns)]
    return answer(session, [messages], sampling)[0].text


def test_piped_questions_are_answered_line_by_line_with_their_history(session, say):
    first = expected(session, "Who are you?")
    second = expected(session, "Who are you?", first, "And now?")
    assert say(session, "Who are you?", "", "  ", "And now?").out == f"{first}\n{second}\n"


def test_a_pipe_gets_neither_colours_nor_remarks(session, say):
    written = say(session, "/help", "/reset", "hello")
    assert written.out == f"{expected(session, 'hello')}\n"
    assert "\033" not in written.out + written.err
    for command in COMMANDS:
        assert command in written.err


def test_reset_forgets_the_conversation(session, say):
    once = expected(session, "hello")
    assert say(session, "hello", "/reset", "hello").out == f"{once}\n{once}\n"


def test_base_answers_without_the_adapter_until_it_is_given_again(session, folder, say):
    tuned, plain = expected(session, "hello"), expected(open_run(folder / "base", need_adapter=False), "hello")
    assert tuned != plain
    lines = ["/base", "hello", "/reset", "/base", "hello"]
    assert say(session, *lines).out == f"{plain}\n{tuned}\n"


def test_base_without_an_adapter_says_so(folder, say):
    written = say(open_run(folder / "base", need_adapter=False), "/base", "hello")
    assert "no adapter" in written.err
    assert written.out.strip()


def test_system_sets_a_system_prompt_and_alone_takes_it_back(session, say):
    asked = [Message("system", "Be brief."), Message("user", "hello")]
    brief, plain = answer(session, [asked], GREEDY)[0].text, expected(session, "hello")
    assert brief != plain
    lines = ["/system Be brief.", "hello", "/reset", "/system", "hello"]
    assert say(session, *lines).out == f"{brief}\n{plain}\n"


def test_exit_leaves_and_what_follows_is_not_read(session, say):
    assert say(session, "/exit", "hello").out == ""


def test_an_unknown_command_in_a_script_is_an_error_that_lists_the_known_ones(session, say):
    with pytest.raises(ConfigError, match="unknown command /restart; there are /reset, /base"):
        say(session, "/restart")


def test_a_question_after_a_blank_may_start_with_a_slash(session, say):
    assert say(session, " /etc/passwd?").out == f"{expected(session, '/etc/passwd?')}\n"


def test_the_oldest_turns_are_dropped_when_the_context_is_full_and_this_is_said_once(session, say):
    questions = [f"{number} {'x' * 40}" for number in range(9)]
    written = say(session, *questions)
    assert written.err.count("oldest turns are dropped") == 1
    history, answers = [], []  # what the chat should keep: 256 tokens less those of an answer
    for question in questions:
        while len(session.encoder.prompt_ids([*history, Message("user", question)])) > 256 - 8:
            del history[:2]
        answers += answer(session, [[*history, Message("user", question)]], GREEDY)
        history += [Message("user", question), Message("assistant", answers[-1].text)]
    assert written.out == "".join(f"{given.text}\n" for given in answers)


def test_a_question_longer_than_the_context_is_refused_with_the_lengths(session, say):
    with pytest.raises(DataError, match="takes 256"):
        say(session, "x" * 400)


def test_an_empty_answer_is_not_kept_in_the_history(session, say):
    prompt = session.encoder.prompt_ids([Message("user", "hello")])
    first = next(session.engine.generate([prompt], GREEDY, session.encoder.stop_ids)).id
    mute = replace(session, encoder=Encoder(session.encoder.tokenizer, session.config.data, frozenset([first])))
    assert expected(mute, "hello") == ""
    assert say(mute, "hello", "hello").out == "\n\n"


def test_bytes_that_are_no_text_do_not_end_the_chat(session, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\n"), encoding="utf-8"))
    chat(session, GREEDY)
    assert capsys.readouterr().out == expected(session, "a\ufffdb") + "\n"


def test_impossible_sampling_is_refused_before_the_first_question(session, say):
    with pytest.raises(ConfigError, match="temperature"):
        say(session, "hello", sampling=Sampling(temperature=-1))
