"""Chat templates of the kinds that models come with, written for these tests, and tokenizers that fit them."""

import json
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{% if m.get('name') %} {{ m['name'] }}{% endif %}"
    "{{ '\n' + m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Reasoning stays in the turns after the last question only; the last answer always shows a block for it.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% else %}{% set content = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if not thought and '</think>' in content %}{% set thought = content.split('</think>')[0].split('<think>')[-1] %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}<|im_start|>assistant\n"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n"
    "{{ content.lstrip('\n') }}{% else %}{{ content }}{% endif %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
# The system text stands in the last question, wherever that is; markers are plain text, only <s> and </s> are tokens.
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}{% else %}"
    "{% set system = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}{% for m in turns %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}"
    "{% if loop.index0 >= turns | length - 2 and system %}[INST] {{ system }}\n\n{{ m.content }} [/INST]"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog and says hello to the world",
    "你好，世界。今天天气很好，我们去公园散步吧。 assistant system user model start end turn think",
    "Numbers 1 2 3 12 123 and punctuation!? (like [this], <that>, {those}) | a_b-c/d\\e",
    "  spaces   and\n\nline\nbreaks\t\ttabs   INST [INST] [/INST] <s> </s> im_start im_end eot_id",
] * 4
MODERN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def byte_level() -> str:
    """A trained byte-level BPE with the word split of Llama-3 and Qwen, as JSON."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(MODERN_SPLIT), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet))
    return tokenizer.to_str()


@cache
def word_marked(scheme: str) -> str:
    """A trained BPE with ▁ for blanks and bytes for the rest: Metaspace (Mistral), or a plain replacement (Gemma)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "replace":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        words = pre_tokenizers.Split(Regex("▁|\n+"), "merged_with_next")
        tokenizer.pre_tokenizer = words
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\n\n", "\t\t"]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=800, special_tokens=special))
    return json.dumps(json.loads(tokenizer.to_str()) | {"added_tokens": []})  # bytes are ordinary pieces


def build(
    backend: str, template: str, bos: str | None, eos: str, special=(), added=(), plain=()
) -> PreTrainedTokenizerFast:
    """A transformers tokenizer; `special` control tokens, `added` ones that are not marked special, `plain` text."""
    tokenizer = Tokenizer.from_str(backend)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in (*added, *plain)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@cache
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """A tokenizer for each kind of template."""
    headers = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    chatml = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    turns = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
    marks = ("<s>", "</s>", "<unk>")
    thinking = ("<think>", "</think>", "<tool_call>")
    return {
        "llama3": build(byte_level(), LLAMA3, "<|begin_of_text|>", "<|eot_id|>", headers),
        "chatml": build(byte_level(), CHATML, "<|im_start|>", "<|im_end|>", chatml),
        "qwen2.5": build(byte_level(), CHATML, None, "<|im_end|>", chatml, ["<|fim_prefix|>", "<tool_call>"]),
        "qwen3": build(byte_level(), QWEN3, None, "<|im_end|>", chatml, thinking),
        "mistral": build(word_marked("first"), MISTRAL, "<s>", "</s>", marks),
        "mistral, marked always": build(word_marked("always"), MISTRAL, "<s>", "</s>", marks),
        "gemma": build(word_marked("replace"), GEMMA, "<bos>", "<eos>", turns, ["<table>"], ["\n\n", "\t\t"]),
    }
