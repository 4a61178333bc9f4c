"""The tutorial's 3,729 rows with the real Llama-3 tokenizer: its ids with `template: tutorial`, the template's otherwise."""

import json

import pytest

from llama3_tokenizer import llama3_tokenizer
from lorikit.config import DataConfig
from lorikit.data.encode import Encoder
from lorikit.data.read import read_rows
from lorikit.data.values import IGNORE

pytestmark = pytest.mark.slow
END_OF_TEXT = 128001  # the tutorial's pad token, which it puts behind every answer


def as_the_tutorial_does(tokenizer, row):
    """Prompt and answer tokenised apart and joined; the prompt masked, cut at 384 tokens."""
    question = f"<|start_header_id|>user<|end_header_id|>\n\n{row['instruction'] + row['input']}<|eot_id|>"
    opening = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    prompt = tokenizer(question + opening, add_special_tokens=False)["input_ids"]
    answer = tokenizer(row["output"] + "<|eot_id|>", add_special_tokens=False)["input_ids"] + [END_OF_TEXT]
    return (prompt + answer)[:384], ([IGNORE] * len(prompt) + answer)[:384]


def test_template_tutorial_gives_the_tutorials_ids_to_the_id(tutorial_data):
    tokenizer = llama3_tokenizer()
    assert len(tokenizer) == 128256
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") == 128009
    config = DataConfig(train=str(tutorial_data), template="tutorial", max_length=384)
    encoder = Encoder(tokenizer, config, frozenset({128009}))
    rows, raw = read_rows([tutorial_data], config), json.loads(tutorial_data.read_text(encoding="utf-8"))
    assert len(rows.conversations) == len(raw) == 3729 and not rows.rejects
    total = 0
    for conversation, row in zip(rows.conversations, raw, strict=True):
        (example,) = encoder.encode(conversation)
        assert (example.input_ids, example.labels) == as_the_tutorial_does(tokenizer, row), conversation.source
        total += len(example.input_ids)
    assert total == 238_937
    assert encoder.stop_ids == {128009, END_OF_TEXT}


def test_the_models_own_template_gives_the_ids_of_apply_chat_template_with_one_bos(tutorial_data):
    tokenizer = llama3_tokenizer()
    config = DataConfig(train=str(tutorial_data))
    encoder = Encoder(tokenizer, config, frozenset({128009}))
    for conversation in read_rows([tutorial_data], config).conversations:
        messages = [{"role": m.role, "content": m.content} for m in conversation.messages]
        (example,) = encoder.encode(conversation)
        assert example.input_ids == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
        assert example.input_ids.count(128000) == 1
        assert [label for label in example.labels if label != IGNORE][-1] == 128009
