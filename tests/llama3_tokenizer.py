"""The real Llama-3 tokenizer, from the vocabulary that the PyPI package llama-models carries."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from chat_templates import LLAMA3, MODERN_SPLIT

NAMED = {
    0: "<|begin_of_text|>",
    1: "<|end_of_text|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "<|eot_id|>",
}


@cache
def llama3_tokenizer() -> PreTrainedTokenizerFast:
    """128,256 tokens, the last 256 of them control tokens. Skips the test where the package is missing."""
    from transformers.convert_slow_tokenizer import TikTokenConverter

    package = find_spec("llama_models")  # not imported: the package wants more than its vocabulary
    if package is None:
        pytest.skip("needs `pip install --no-deps llama-models`")
    vocabulary = Path(package.submodule_search_locations[0]) / "llama3" / "tokenizer.model"
    unnamed = iter(range(256))
    special = [NAMED.get(k) or f"<|reserved_special_token_{next(unnamed)}|>" for k in range(256)]
    converter = TikTokenConverter(vocab_file=str(vocabulary), pattern=MODERN_SPLIT, extra_special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=converter.converted(),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        clean_up_tokenization_spaces=False,
        chat_template=LLAMA3,
    )
