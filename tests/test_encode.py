"""The token path, on every kind of chat template: ids, labels, and text that stays text."""

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from chat_templates import build, byte_level, tokenizers
from lorikit.config import DataConfig
from lorikit.data.encode import Encoder
from lorikit.data.values import IGNORE, Conversation, Message, answer_message
from lorikit.errors import ConfigError, DataError, ModelError

KINDS = sorted(tokenizers())
words = st.sampled_from(
    [
        "hello",
        "The",
        "你好",
        "，",
        "é",
        "🙂",
        "\n",
        "\n\n",
        "\t\t",
        " ",
        "  ",
        "a_b",
        "12345",
        "<",
        "|",
        ">",
        "[INST]",
        "</",
        "im_",
    ]
)
any_text = st.one_of(st.text(min_size=1, max_size=30), st.lists(words, min_size=1, max_size=12).map("".join))
clean = any_text.map(str.strip).filter(bool)


def encoder(kind, **data):
    return _encoder(kind, json.dumps(data))


@cache
def _encoder(kind, settings):
    data = json.loads(settings)
    return Encoder(tokenizers()[kind], DataConfig(train="x", **data))


def dicts(messages):
    return [{"role": m.role, "content": m.content} for m in messages]


def conversation(*texts, system=None):
    turns = [Message("user" if k % 2 == 0 else "assistant", text) for k, text in enumerate(texts)]
    return Conversation(tuple([Message("system", system)] if system else []) + tuple(turns), "f:1")


def controls_in(kind, text):
    safe = encoder(kind).control_ids
    return [i for i in tokenizers()[kind](text, add_special_tokens=False)["input_ids"] if i in safe]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(KINDS), st.lists(st.tuples(clean, clean), min_size=1, max_size=3), st.one_of(st.none(), clean))
def test_clean_rows_have_the_ids_of_apply_chat_template(kind, pairs, system):
    texts = [text for pair in pairs for text in pair]
    if any(controls_in(kind, text) for text in (*texts, system or "")):
        return
    if kind == "gemma":
        system = None
    row = conversation(*texts, system=system)
    tokenizer = tokenizers()[kind]
    examples = encoder(kind).encode(row)
    if len(examples) == 1:
        want = [tokenizer.apply_chat_template(dicts(row.messages), tokenize=True, return_dict=False)]
    else:  # each turn as it is rendered when it is the last one
        ends = [i for i, m in enumerate(row.messages) if m.role == "assistant"]
        assert kind in ("qwen3", "mistral", "mistral, marked always") and len(examples) == len(ends)
        want = [
            tokenizer.apply_chat_template(dicts(row.messages[: i + 1]), tokenize=True, return_dict=False) for i in ends
        ]
    assert [e.input_ids for e in examples] == want


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(any_text, any_text), min_size=1, max_size=3),
    st.sampled_from(["all", "last"]),
)
def test_the_labels_are_what_generation_would_have_to_say_and_nothing_else(kind, pairs, train_on):
    texts = [text for pair in pairs for text in pair]
    row = conversation(*texts)
    made = encoder(kind, train_on=train_on)
    examples = made.encode(row)
    answers = [i for i, m in enumerate(row.messages) if m.role == "assistant"]
    answers = answers if train_on == "all" else answers[-1:]
    found = []
    for example in examples:
        labels = [*example.labels, IGNORE]
        assert all(label in (token, IGNORE) for label, token in zip(example.labels, example.input_ids, strict=True))
        starts = [k for k, label in enumerate(labels) if label != IGNORE and (k == 0 or labels[k - 1] == IGNORE)]
        found += [(example, k, k + labels[k:].index(IGNORE)) for k in starts]
    assert len(found) == len(answers)
    for (example, start, end), turn in zip(found, answers, strict=True):
        assert example.input_ids[end - 1] in made.stop_ids
        assert made.stop_ids.isdisjoint(example.input_ids[start : end - 1])
        if len(examples) in (1, len(answers)):
            assert example.input_ids[:start] == made.prompt_ids(row.messages[:turn])


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from(KINDS))
def test_text_never_becomes_a_control_token(data, kind):
    tokenizer = tokenizers()[kind]
    names = sorted(t.content for t in tokenizer.added_tokens_decoder.values() if t.content.strip())
    hostile = (
        st.lists(st.one_of(st.sampled_from(names), words), min_size=1, max_size=6)
        .map("".join)
        .map(str.strip)
        .filter(bool)
    )
    texts = data.draw(st.lists(hostile, min_size=2, max_size=4).filter(lambda t: len(t) % 2 == 0))
    system, name = data.draw(st.one_of(st.none(), hostile)), data.draw(st.one_of(st.none(), hostile))
    made = encoder(kind)
    row = conversation(*texts, system=system)
    row = Conversation(tuple(named(m, name) for m in row.messages), "f:1")
    harmless = conversation(*("x" for _ in texts), system="x" if system else None)
    harmless = Conversation(tuple(named(m, "x" if name else None) for m in harmless.messages), "f:1")
    for example, plain in zip(made.encode(row), made.encode(harmless), strict=True):
        got = [i for i in example.input_ids if i in made.control_ids]
        assert got == [i for i in plain.input_ids if i in made.control_ids]
        shown = tokenizer.decode([i for i in example.input_ids if i not in made.control_ids], skip_special_tokens=False)
        if kind in ("chatml", "qwen2.5"):
            for text in texts:
                assert text in shown


def named(message, name):
    if message.role == "assistant":
        return message
    return Message(message.role, message.content, name, message.reasoning)


@pytest.mark.parametrize("kind", KINDS)
def test_every_special_and_added_token_stays_text_in_every_place(kind):
    tokenizer = tokenizers()[kind]
    made = encoder(kind)
    plain = [i for i in made.encode(conversation("x", "x", system="x"))[0].input_ids if i in made.control_ids]
    for token in tokenizer.added_tokens_decoder.values():
        if not token.content.strip():
            continue
        for texts in (
            (f"a {token.content} b", "x", "x"),
            ("x", token.content, "x"),
            ("x", "x", f"{token.content}{token.content}c"),
        ):
            example = made.encode(conversation(texts[0], texts[1], system=texts[2]))[0]
            assert [i for i in example.input_ids if i in made.control_ids] == plain
            assert [i for i in made.prompt_ids([Message("user", texts[0])]) if i in made.control_ids]


@pytest.mark.parametrize("kind", ["llama3", "mistral", "gemma"])
def test_bos_stands_exactly_once_at_the_start(kind):
    made, bos = encoder(kind), tokenizers()[kind].bos_token_id
    for row in (
        conversation("a", "b"),
        conversation("a", "b", "c", "d"),
        conversation(tokenizers()[kind].bos_token, "b"),
    ):
        for example in made.encode(row):
            assert example.input_ids[0] == bos and example.input_ids.count(bos) == 1


def test_a_template_with_two_bos_or_none_is_refused():
    template = "{{ bos_token }}" + tokenizers()["llama3"].chat_template
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    twice = build(byte_level(), template, "<|begin_of_text|>", "<|eot_id|>", special)
    with pytest.raises(DataError, match="twice"):
        Encoder(twice, DataConfig(train="x"))


def test_a_template_without_a_stop_token_is_refused():
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(DataError, match="stop token"):
        Encoder(build(byte_level(), template, None, "<|im_end|>", ["<|im_end|>"]), DataConfig(train="x"))


def test_a_template_that_opens_answers_in_another_way_when_generating_is_refused():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = build(byte_level(), template, None, "<|im_end|>", ["<|im_start|>", "<|im_end|>", "<think>"])
    with pytest.raises(DataError, match="differently in training than in generation"):
        Encoder(tokenizer, DataConfig(train="x"))


def test_a_model_that_stops_elsewhere_learns_where_its_template_stops():
    tokenizer = build(
        byte_level(),
        tokenizers()["chatml"].chat_template,
        None,
        "<|endoftext|>",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    )
    made = Encoder(tokenizer, DataConfig(train="x"), frozenset({tokenizer.eos_token_id}))
    assert made.stop_ids == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert "<|im_end|>" in made.notes[0]


def test_reasoning_is_trained_where_it_is_generated():
    made = encoder("qwen3")
    think = [tokenizers()["qwen3"].convert_tokens_to_ids(t) for t in ("<think>", "</think>")]
    turns = (
        Message("user", "q"),
        Message("assistant", "a", reasoning="because"),
        Message("user", "r"),
        Message("assistant", "b"),
    )
    first, second = made.encode(Conversation(turns, "f:1"))
    learnt = [i for i, label in zip(first.input_ids, first.labels, strict=True) if label != IGNORE]
    assert all(t in learnt for t in think) and "because" in made.decode(learnt)
    assert "because" not in made.decode(second.input_ids)
    assert [i for i in second.labels if i in think] == think
    off = encoder("qwen3", template_kwargs={"enable_thinking": False})
    example = off.encode(Conversation(turns[2:], "f:1"))[0]
    assert [i for i in example.input_ids if i in think] == think and not [i for i in example.labels if i in think]
    with pytest.raises(DataError, match="differently"):
        off.encode(Conversation(turns[:2], "f:1"))


def test_thought_tags_typed_into_an_answer_stay_text():
    made = encoder("qwen3")
    example = made.encode(conversation("q", "<think>x</think>y"))[0]
    think = tokenizers()["qwen3"].convert_tokens_to_ids("<think>")
    assert example.input_ids.count(think) == 1  # the template's own, empty one
    assert "<think>x</think>y" in made.decode(example.input_ids)


def test_a_system_prompt_comes_from_the_setting_and_goes_into_the_first_question_where_there_is_no_role():
    for kind in ("llama3", "chatml", "mistral"):
        with_setting = encoder(kind, system="Be brief.").encode(conversation("hi", "yo"))
        assert (
            with_setting[0].input_ids == encoder(kind).encode(conversation("hi", "yo", system="Be brief."))[0].input_ids
        )
        own = encoder(kind, system="Be brief.").encode(conversation("hi", "yo", system="Be loud."))
        assert own[0].input_ids == encoder(kind).encode(conversation("hi", "yo", system="Be loud."))[0].input_ids
    gemma = encoder("gemma", system="Be brief.")
    assert "no system role" in gemma.notes[0]
    want = encoder("gemma").encode(conversation("Be brief.\n\nhi", "yo"))[0].input_ids
    assert gemma.encode(conversation("hi", "yo"))[0].input_ids == want
    assert gemma.prompt_ids([Message("user", "hi")]) == encoder("gemma").prompt_ids(
        [Message("user", "Be brief.\n\nhi")]
    )


def test_a_row_the_template_refuses_is_a_data_error_with_its_words():
    row = Conversation((Message("user", "a"), Message("user", "b"), Message("assistant", "c")), "f:1")
    with pytest.raises(DataError, match="must alternate"):
        encoder("gemma").encode(row)


def test_an_answer_that_begins_with_line_breaks_is_tokenised_as_generation_sees_it():
    made = encoder("qwen2.5")
    row = conversation("q", "\n\nhello")
    prompt = made.prompt_ids(row.messages[:1])
    example = made.encode(row)[0]
    assert example.input_ids[: len(prompt)] == prompt
    assert example.labels[len(prompt)] != IGNORE
    whole = tokenizers()["qwen2.5"].apply_chat_template(dicts(row.messages), tokenize=True, return_dict=False)
    assert made.tokenizer.decode(example.input_ids) == made.tokenizer.decode(whole)


def tricky_tokenizer():
    """Lower-cases its input before it looks for added tokens, and has one of them among its ordinary words."""
    vocabulary = {
        t: k
        for k, t in enumerate(["[UNK]", "<stop>", "<turn>", "stop", "turn", "<", ">", "a", "user", "assistant", "<s>"])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken("<stop>", normalized=True), AddedToken("<turn>", normalized=True)])
    template = "{% for m in messages %}<turn> {{ m.role }} {{ m.content }} <stop> {% endfor %}"
    template += "{% if add_generation_prompt %}<turn> assistant {% endif %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<stop>", unk_token="[UNK]", chat_template=template
    )


def test_tokens_matched_after_lower_casing_or_present_as_words_stay_text_too():
    made = Encoder(tricky_tokenizer(), DataConfig(train="x"))
    plain = [i for i in made.encode(conversation("a", "a"))[0].input_ids if i in made.control_ids]
    for text in ("<STOP>", "a <Stop> a", "<stop>", "<tUrN> <stop> a"):
        for texts in ((text, "a"), ("a", text)):
            got = made.encode(conversation(*texts))[0].input_ids
            assert [i for i in got if i in made.control_ids] == plain


def test_private_use_characters_of_the_data_survive():
    made = encoder("chatml")
    text = "\U000f0000 <|im_end|> \U000f0001"
    assert text in made.decode(made.encode(conversation(text, "x"))[0].input_ids)
    with pytest.raises(DataError, match=r"U\+10FFFD"):
        made.encode(conversation("\U0010fffd", "x"))


def test_a_tokenizer_without_a_template_or_without_a_fast_backend_is_refused():
    bare = build(byte_level(), "", None, "<|im_end|>", ["<|im_end|>"])
    with pytest.raises(ConfigError, match="no chat template"):
        Encoder(bare, DataConfig(train="x"))
    with pytest.raises(ConfigError, match="Llama-3"):
        encoder("gemma", template="tutorial")
    with pytest.raises(ConfigError, match=r"missing\.jinja"):
        encoder("gemma", template="missing.jinja")

    class Slow:
        name_or_path = "slow"

    with pytest.raises(ModelError, match="fast tokenizer"):
        Encoder(Slow(), DataConfig(train="x"))


def test_a_template_of_ones_own_replaces_the_tokenizers(tmp_path):
    path = tmp_path / "own.jinja"
    path.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    made = encoder("chatml", template=str(path))
    text = made.tokenizer.decode(made.encode(conversation("hi", "yo"))[0].input_ids)
    assert text == "<|im_start|>user: hi<|im_end|><|im_start|>assistant: yo<|im_end|>"


def test_a_name_on_an_answer_that_generation_would_not_write_is_refused():
    row = Conversation((Message("user", "a"), Message("assistant", "b", name="Bo")), "f:1")
    with pytest.raises(DataError, match="differently in training than in generation"):
        encoder("chatml").encode(row)


def test_reasoning_is_not_lost_where_the_template_does_not_know_it():
    row = Conversation((Message("user", "a"), Message("assistant", "b", reasoning="why")), "f:1")
    made = encoder("llama3")
    example = made.encode(row)[0]
    assert "<think>\nwhy\n</think>\n\nb" in made.decode([i for i in example.labels if i != IGNORE])


def test_thoughts_are_shown_in_an_answer_and_special_tokens_are_not():
    tokenizer = tokenizers()["qwen3"]
    ids = tokenizer("<think>\nwhy\n</think>\n\nb<|im_end|>", add_special_tokens=False)["input_ids"]
    text = encoder("qwen3").decode(ids)
    assert text == "<think>\nwhy\n</think>\n\nb"
    assert answer_message(text) == Message("assistant", "b", reasoning="why")


def test_characters_without_a_token_are_named():
    spelled = Tokenizer(models.BPE(vocab={c: k for k, c in enumerate("abcÃ©")}, merges=[]))
    spelled.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spelled.decoder = decoders.ByteLevel()
    spelled.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    made = Encoder(
        PreTrainedTokenizerFast(
            tokenizer_object=spelled, eos_token="<|im_end|>", chat_template=tokenizers()["chatml"].chat_template
        ),
        DataConfig(train="x"),
    )
    assert made.lost([Message("user", "a你b z"), Message("assistant", "zé")]) == "你z"
    for kind in KINDS:
        assert encoder(kind).lost([Message("user", "a你b\n\t🙂 \ufffd")]) == ""


def test_the_saved_tokenizer_renders_with_the_template_of_the_run(tmp_path):
    (tmp_path / "own.jinja").write_text(tokenizers()["chatml"].chat_template.replace("helpful", "brief"))
    made = Encoder(tokenizers()["chatml"], DataConfig(train="x", template=str(tmp_path / "own.jinja")))
    made.save_tokenizer(tmp_path / "saved")
    again = Encoder(AutoTokenizer.from_pretrained(tmp_path / "saved"), DataConfig(train="x"))
    question = [Message("user", "hi")]
    assert again.prompt_ids(question) == made.prompt_ids(question) != encoder("chatml").prompt_ids(question)
    assert "helpful" in tokenizers()["chatml"].chat_template
