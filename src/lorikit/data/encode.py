"""Conversation -> Example: the one token path of training, evaluation, chat and serving.

A conversation is rendered by the tokenizer's own chat template. Each assistant turn is found by rendering prefixes:

    prompt(i) = render(messages[:i], add_generation_prompt=True)       what generation will see
    turn(i)   = render(messages[:i + 1])                               must begin with prompt(i)
    labelled  = turn(i)[len(prompt(i)):] up to and including its stop token

Ids before the answer are exactly the ids that generation feeds, also where a tokenizer would have merged across that
border. Where a template renders earlier turns in another way than the last one (Qwen3 drops old reasoning), each turn
becomes an Example of its own, in the form in which it is generated.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lorikit.config import DataConfig
from lorikit.data.border import Encoded, Rendered
from lorikit.data.tokens import SafeTokenizer
from lorikit.data.values import IGNORE, Conversation, Example, Message
from lorikit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The tutorial's own layout: no BOS, and its pad token <|end_of_text|> learnt after each answer.
TUTORIAL_TEMPLATE = (
    "{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>"
    "{% if message.role == 'assistant' %}<|end_of_text|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
_ROWS, _CHARS = 256, 2**19  # rows tokenised at a time: some 10 MiB
_PROBE = (Message("system", "s"), Message("user", "u"), Message("assistant", "a"), Message("user", "v"))


@dataclass(frozen=True, slots=True)
class _Sheet:
    """A text to encode, cut where the answers of `turns` begin. `ends`: which of them are labelled, up to which character."""

    rendered: Rendered
    turns: list[int]
    ends: dict[int, int]
    source: str


class Encoder:
    """Conversations to token ids for one tokenizer and one set of data settings.

    `model_stop_ids` are the ids at which the model's generation config stops. `stop_ids` adds the tokenizer's EOS and the
    token with which the template ends an answer: generation stops at all of them. `control_ids` are the tokens that
    text can never become, `silent_ids` those of them that answers do not show. `notes` says in plain words what the
    template made necessary.

    Raises ConfigError when the tokenizer has no chat template or the settings do not fit it, DataError when the template
    cannot be trained as it is (BOS, stop token).
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, model_stop_ids: frozenset[int] = frozenset()
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.notes: list[str] = []
        self._safe = SafeTokenizer(tokenizer)
        self.control_ids, self.silent_ids = self._safe.control_ids, self._safe.silent_ids
        self._template = _template_text(tokenizer, config)
        self._folds_system, self._folds_reasoning = False, False
        self._folds_system = not self._knows_system()
        self._folds_reasoning = not self._shows("user", "assistant", reasoning_content="\uf8ffreason")
        self.stop_ids = self._find_stop_ids(model_stop_ids)
        self._bos = self._expected_bos()

    def encode(self, conversation: Conversation) -> list[Example]:
        """The row's tokens and labels: one Example, or one a turn where the template renders history in another way.

        Raises DataError (the reason, without the source) when the row cannot be trained as it says.
        """
        sheets = self._sheets(conversation)
        return self._examples(sheets, self._safe.encode_all([sheet.rendered for sheet in sheets]))

    def encode_all(self, conversations: Iterable[Conversation]) -> Iterator[list[Example] | DataError]:
        """`encode` of each, in order, or why it cannot be trained; on all processors, a batch ahead of what is asked for."""
        with ThreadPoolExecutor(1) as pool:
            waiting: tuple[list[list[_Sheet] | DataError], Future[list[Encoded]]] | None = None
            for batch in _batches(conversations):
                every = [self._sheets_or_reason(conversation) for conversation in batch]
                texts = [sheet.rendered for sheets in every if not isinstance(sheets, DataError) for sheet in sheets]
                # The next batch is tokenised, outside of Python's lock, while this one is looked at.
                following = every, pool.submit(self._safe.encode_all, texts)
                if waiting:
                    yield from self._settled(*waiting)
                waiting = following
            if waiting:
                yield from self._settled(*waiting)

    def _settled(
        self, every: list[list[_Sheet] | DataError], encoded: Future[list[Encoded]]
    ) -> Iterator[list[Example] | DataError]:
        rest = iter(encoded.result())
        for sheets in every:
            if isinstance(sheets, DataError):
                yield sheets
                continue
            try:
                yield self._examples(sheets, [next(rest) for _ in sheets])
            except DataError as error:
                yield error

    def _sheets_or_reason(self, conversation: Conversation) -> list[_Sheet] | DataError:
        try:
            return self._sheets(conversation)
        except DataError as error:
            return error

    def _sheets(self, conversation: Conversation) -> list[_Sheet]:
        """The texts of a row: one, or one a turn where the template renders history in another way. Raises as `encode`."""
        messages = self._fitted(conversation.messages)
        standins: dict[str, str] = {}
        shown = self._protected(messages, standins)
        openings = self._openings(shown)
        turns = sorted(openings) if self.config.train_on == "all" else sorted(openings)[-1:]
        if not turns:
            raise DataError("has no assistant turn to learn")
        full = self._render(shown)
        texts = {i: full if i == len(messages) - 1 else self._render(shown[: i + 1]) for i in turns}
        for i, text in texts.items():
            if not text.startswith(openings[i]):
                raise DataError(
                    f"turn {i + 1}: the chat template renders the answer differently in training than in generation "
                    f"({openings[i][-40:]!r} is not how the trained text begins); see data.template_kwargs"
                )
        if all(full.startswith(text) for text in texts.values()):
            groups = [(full, turns)]
        else:
            groups = [(text, [i]) for i, text in texts.items()]
        sheets = []
        for text, labelled in groups:
            cuts = _cuts(text, openings)
            rendered = Rendered(text, standins, list(cuts.values()))
            ends = {i: len(texts[i]) for i in labelled}
            sheets.append(_Sheet(rendered, list(cuts), ends, conversation.source))
        return sheets

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The ids that generation starts from: the conversation so far and the opening of the assistant's turn.

        They equal the first ids of the trained row. Raises DataError when the template refuses the conversation.
        """
        if not messages or messages[-1].role == "assistant":
            raise DataError("a prompt must end with a user turn")
        standins: dict[str, str] = {}
        shown = self._protected(self._fitted(messages), standins)
        rendered = self._render(shown, generate=True)
        cuts = _cuts(rendered, self._openings(shown))
        return self._safe.encode(rendered, standins, [*cuts.values(), len(rendered)]).ids

    def render(self, messages: Sequence[Message], *, generate: bool = False) -> str:
        """The text of a conversation as the template shows it; `generate` opens the next assistant turn."""
        return self._render(self._protected(self._fitted(messages), {}), generate=generate)

    def text_ids(self, text: str) -> list[int]:
        """The ids of plain text to go on with, after BOS where the model has one; none of it becomes a control token."""
        standins: dict[str, str] = {}
        protected = self._safe.protect(text, standins, text)
        return [*([] if self._bos is None else [self._bos]), *self._safe.encode(protected, standins).ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, without special tokens. Added ones that are not special, such as <think>, are part of it."""
        text = self.tokenizer.decode(
            [i for i in ids if i not in self.silent_ids], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def lost(self, messages: Sequence[Message]) -> str:
        """The characters of a conversation that the tokenizer cannot spell and that would be gone in its tokens."""
        return self._safe.lost("".join(part for m in messages for part in (m.content, m.reasoning or "")))

    def save_tokenizer(self, folder: Path) -> None:
        """The tokenizer with the chat template of this run, so that whoever loads it renders the same text."""
        saved = copy.copy(self.tokenizer)  # a deep copy builds the vocabulary anew: half a second with Llama-3's
        saved.chat_template = self._template
        saved.save_pretrained(str(folder))

    def _openings(self, shown: list[dict[str, str]]) -> dict[int, str]:
        """For each assistant turn the text from which it would be generated."""
        return {i: self._render(shown[:i], generate=True) for i, m in enumerate(shown) if m["role"] == "assistant"}

    def _examples(self, sheets: Sequence[_Sheet], encoded: Sequence[Encoded]) -> list[Example]:
        return [self._example(sheet, one) for sheet, one in zip(sheets, encoded, strict=True)]

    def _example(self, sheet: _Sheet, encoded: Encoded) -> Example:
        """One text with its turns labelled. Raises as `encode`."""
        starts = dict(zip(sheet.turns, zip(sheet.rendered.cuts, encoded.counts, strict=True), strict=True))
        ids = encoded.ids
        labels = [IGNORE] * len(ids)
        for turn, text_end in sheet.ends.items():
            opening, start = starts[turn]
            last = max((i for i, end in encoded.controls if i >= start and end <= text_end), default=None)
            if last is None or ids[last] not in self.stop_ids:
                answer = sheet.rendered.text[opening:text_end]
                raise DataError(
                    f"the answer {answer[:40]!r} does not end with a stop token, so the model would never "
                    "learn to stop; use the tokenizer of an instruct model or a data.template that ends answers"
                )
            labels[start : last + 1] = ids[start : last + 1]
        if self._bos is not None and (ids[0] != self._bos or ids.count(self._bos) != 1):
            raise DataError(
                f"BOS {self._name(self._bos)} stands {ids.count(self._bos)} times instead of once, at the start"
            )
        return Example(ids, labels, sheet.source)

    def _fitted(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """Messages as this template can show them: the setting's system prompt, system and reasoning where it has no place."""
        turns = tuple(messages)
        if self.config.system and (not turns or turns[0].role != "system"):
            turns = (Message("system", self.config.system), *turns)
        if self._folds_system and len(turns) > 1 and turns[0].role == "system":
            joined = f"{turns[0].content}\n\n{turns[1].content}"
            turns = (replace(turns[1], content=joined), *turns[2:])
        if self._folds_reasoning:  # a template that does not know reasoning must not lose it
            turns = tuple(
                replace(m, content=f"<think>\n{m.reasoning}\n</think>\n\n{m.content}", reasoning=None)
                if m.reasoning
                else m
                for m in turns
            )
        return turns

    def _protected(self, messages: Sequence[Message], standins: dict[str, str]) -> list[dict[str, str]]:
        """Messages as templates take them, with the control tokens in their text replaced."""
        avoid = "".join(part for m in messages for part in (m.content, m.name or "", m.reasoning or ""))
        shown = []
        for m in messages:
            fields = {"content": m.content, "name": m.name, "reasoning_content": m.reasoning}
            safe = {k: self._safe.protect(v, standins, avoid) for k, v in fields.items() if v is not None}
            shown.append({"role": m.role, **safe})
        return shown

    def _render(self, messages: list[dict[str, str]], *, generate: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=generate,
                chat_template=self._template,
                **self.config.template_kwargs,
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise DataError(f"the chat template refuses the conversation: {error}") from None
        assert isinstance(text, str)
        return text

    def _knows_system(self) -> bool:
        """Whether the template shows a system turn; if not, its text goes before the first user turn."""
        known = self._shows("system", "user", "assistant")
        if not known:
            self.notes.append("the chat template has no system role: a system prompt is put before the first user turn")
        return known

    def _shows(self, *roles: str, **last: str) -> bool:
        """Whether the template shows every text of a conversation with these roles, and of fields of its last turn."""
        probe = [{"role": role, "content": f"\uf8ff{role}"} for role in roles]
        probe[-1] |= last
        try:
            rendered = self._render(probe)
        except DataError:
            return False
        return all(text in rendered for turn in probe for key, text in turn.items() if key != "role")

    def _probe_ids(self) -> tuple[list[int], int]:
        """Ids of a short conversation with one answer, and where this answer begins."""
        shown = self._protected(self._fitted(_PROBE[:3]), {})
        prompt, text = self._render(shown[:-1], generate=True), self._render(shown)
        if not text.startswith(prompt):
            raise DataError(
                "the chat template renders an answer differently in training than in generation: generation starts from "
                f"{prompt[-60:]!r}, training shows {text[-80:]!r}; set data.template_kwargs or another data.template"
            )
        encoded = self._safe.encode(text, {}, [len(prompt)])
        return encoded.ids, encoded.counts[0]

    def _find_stop_ids(self, model_stop_ids: frozenset[int]) -> frozenset[int]:
        ids, start = self._probe_ids()
        eos = self.tokenizer.eos_token_id
        known = model_stop_ids | ({eos} if isinstance(eos, int) else set())
        closing = [i for i in ids[start:] if i in self.control_ids][-1:]
        if known.isdisjoint(ids[start:]):
            if not closing:
                raise DataError(
                    "the chat template ends no answer with a stop token, so the model would never learn to stop; use the "
                    "tokenizer of an instruct model or a data.template that ends answers"
                )
            self.notes.append(f"answers end with {self._name(closing[0])}; generation stops there too")
        return frozenset(known | set(closing))

    def _expected_bos(self) -> int | None:
        """The BOS id that must stand exactly once at the start of a row; None where the model's rows have none."""
        bos = self.tokenizer.bos_token_id
        ids, _ = self._probe_ids()
        if not isinstance(bos, int) or self.config.template == "tutorial":
            if self.config.template == "tutorial":
                self.notes.append("template: tutorial trains without BOS, as the tutorial does")
            return None
        if bos not in ids:
            adds_bos = self.tokenizer("x")["input_ids"][:1] == [bos]
            if adds_bos:
                raise DataError(
                    f"this tokenizer puts {self._name(bos)} before every text but the chat template does not: the model "
                    "would be trained on rows it never sees; give data.template a Jinja file that begins with {{ bos_token }}"
                )
            return None
        if ids[0] == bos and ids.count(bos) == 1:
            return bos
        if ids[:2] == [bos, bos]:
            raise DataError(f"the chat template puts BOS {self._name(bos)} twice; mend it in data.template")
        return None  # ChatML models name <|im_start|>, which opens every turn, their BOS

    def _name(self, token_id: int) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(token_id))


def _batches(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    """Up to _ROWS in order, and about _CHARS together."""
    batch: list[Conversation] = []
    num_chars = 0
    for conversation in conversations:
        batch.append(conversation)
        num_chars += sum(len(turn.content) for turn in conversation.messages)
        if len(batch) == _ROWS or num_chars >= _CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _cuts(rendered: str, openings: dict[int, str]) -> dict[int, int]:
    """Where each answer begins in `rendered`. Earlier ones are cut there too, labelled or not: it is how they were
    generated, and so a conversation's ids do not depend on which of its turns is looked at."""
    return {turn: len(text) for turn, text in openings.items() if rendered.startswith(text)}


def _template_text(tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> str:
    """The Jinja text that data.template names."""
    if config.template == "auto":
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = template.get("default")
        if not template:
            raise ConfigError(
                f"{tokenizer.name_or_path}: the tokenizer has no chat template (a base model?); take the instruct model, "
                "or give data.template the path of a Jinja file"
            )
        return str(template)
    if config.template == "tutorial":
        needed = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"]
        lacking = [t for t in needed if t not in tokenizer.get_added_vocab()]
        if lacking:
            raise ConfigError(f"data.template: tutorial needs a Llama-3 tokenizer; this one lacks {', '.join(lacking)}")
        return TUTORIAL_TEMPLATE
    try:
        return Path(config.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"data.template is {config.template!r}: auto, tutorial, or a Jinja file that can be read ({error})"
        ) from None
