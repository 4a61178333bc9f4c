"""The requests of OpenAI's API as far as one model can answer them, and the tutorial's own.

What is not supported is refused with its name, never ignored; only labels that cannot change an answer are taken as they
come (user, metadata, ...). Values that are left out are those of `lorikit chat`; a temperature of 0 is greedy, without
repetition penalty unless one is given.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from lorikit.data.values import Message, answer_message
from lorikit.model.engine import Sampling

MAX_CHOICES, MAX_TOP_LOGPROBS, MAX_STOPS = 16, 20, 16
MAX_TURNS = 1000  # a template is rendered up to each answer of the history, which takes the square of their number
MAX_NEW_TOKENS = Sampling().max_new_tokens
_TOP_COMPLETION_LOGPROBS = 5
_MOST_SEED = 10**19  # any integer of 64 bits; the document's limits are read as float64, which holds this one exactly
_GREEDY_BELOW = 1e-3  # such a temperature takes the likeliest token all the same, and logits divided by it overflow


def _unicode(text: str) -> str:
    """Half of a surrogate pair, which JSON can write, is no text."""
    if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
        raise ValueError("holds half of a surrogate pair, which is no character")
    return text


def _number(value: Any) -> Any:
    """pydantic would take true and "0.5" for numbers, which the document does not."""
    if isinstance(value, bool | str):
        raise ValueError("a number is wanted")
    return value


def _flag(value: Any) -> Any:
    """0 is equal to false, and is none in JSON."""
    if not isinstance(value, bool):
        raise ValueError("true or false is wanted")
    return value


_NUMBER = BeforeValidator(_number)  # behind its Field, so that the document has the limits
Flag = Annotated[bool, BeforeValidator(_flag)]
Off = Annotated[Literal[False], BeforeValidator(_flag)]
Zero = Annotated[Literal[0], _NUMBER]
Text = Annotated[str, AfterValidator(_unicode)]
Prompt = Annotated[Text, Field(min_length=1)]
Stop = Annotated[Text, Field(min_length=1, max_length=1000)]


class ApiError(Exception):
    """An answer in OpenAI's shape of an error."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code
        self.message, self.param = _printable(message), param and _printable(param)

    def body(self) -> dict[str, Any]:
        """{"error": {...}}"""
        kind = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        error = {
            "message": self.message,
            "type": kind.get(self.status, default),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Strict):
    """The only kind of content part that a text model takes."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Text | None = None
    reasoning_content: Text | None = None
    refusal: None = None

    def message(self) -> Message:
        """The same as the encoder takes it; a developer's turn is a system turn."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        if self.role == "assistant":
            turn = answer_message(text)
            reasoning = self.reasoning_content or turn.reasoning
            return Message("assistant", turn.content, self.name, reasoning)
        return Message("system" if self.role == "developer" else self.role, text, self.name)


class StreamOptions(_Strict):
    """`include_usage` adds a last chunk with the token counts."""

    include_usage: Flag = False
    include_obfuscation: Off | None = None


class ResponseFormat(_Strict):
    """Plain text only."""

    type: Literal["text"]


def _needs(name: str, off: list[Any], other: str) -> dict[str, Any]:
    """JSON schema: a property that is not `off` needs another one to be true."""
    unused = {"anyOf": [{"properties": {name: {"enum": off}}}, {"not": {"required": [name]}}]}
    return {"anyOf": [unused, {"properties": {other: {"const": True}}, "required": [other]}]}


_STREAM_RULE = _needs("stream_options", [None], "stream")


class _Sampled(_Strict):
    """What both kinds of completion have."""

    model_config = ConfigDict(json_schema_extra={"allOf": [_STREAM_RULE]})

    model: Text
    temperature: Annotated[float, Field(ge=0, le=2), _NUMBER] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), _NUMBER] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1, description="0 and -1 are off"), _NUMBER] | None = None
    min_p: Annotated[float, Field(ge=0, le=1), _NUMBER] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.1, le=10), _NUMBER] | None = None
    seed: Annotated[int, Field(ge=-_MOST_SEED, le=_MOST_SEED), _NUMBER] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES), _NUMBER] | None = None
    stop: Stop | list[Stop] | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), _NUMBER] | None = None
    frequency_penalty: Zero | None = None
    presence_penalty: Zero | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None

    def stops(self) -> tuple[str, ...]:
        """Stop strings; ApiError for too many."""
        given = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(given) > MAX_STOPS:
            raise ApiError(400, f"stop has {len(given)} strings; at most {MAX_STOPS}", param="stop")
        return given

    def sampling(self, room: int, longest: int, choice: int) -> Sampling:
        """How the `choice`-th answer is drawn, with at most `longest` tokens and no more than there is `room` for."""
        own = Sampling()
        temperature = own.temperature if self.temperature is None else self.temperature
        temperature = temperature if temperature > _GREEDY_BELOW else 0.0
        penalty = self.repetition_penalty or (1.0 if temperature == 0 else own.repetition_penalty)
        return Sampling(
            max_new_tokens=max(1, min(room, longest)),
            temperature=temperature,
            top_p=own.top_p if self.top_p is None else self.top_p,
            top_k=max(self.top_k or 0, 0),
            repetition_penalty=penalty,
            seed=None if self.seed is None else (self.seed + choice) % 2**63,
            min_p=self.min_p or 0.0,
        )


class ChatRequest(_Sampled):
    """POST /v1/chat/completions"""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [_STREAM_RULE, _needs("top_logprobs", [0, None], "logprobs")]}
    )

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_TURNS, description="the last turn is the user's")
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), _NUMBER] | None = None
    logprobs: Flag | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), _NUMBER] | None = None
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: Flag | None = None
    metadata: dict[str, str] | None = None
    store: Off | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def longest(self) -> int:
        """The most tokens that the client wants."""
        return self.max_completion_tokens or self.max_tokens or MAX_NEW_TOKENS

    def num_top(self) -> int | None:
        """As Request.top_logprobs; ApiError for top_logprobs without logprobs."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampled):
    """POST /v1/completions: the prompt goes on, without a chat template; text is never a control token."""

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MAX_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=_TOP_COMPLETION_LOGPROBS), _NUMBER] | None = None
    echo: Off | None = None
    suffix: Literal[""] | None = None
    best_of: Annotated[Literal[1], _NUMBER] | None = None

    def longest(self) -> int:
        """The most tokens that the client wants; 16 is OpenAI's default here."""
        return self.max_tokens or 16

    def prompts(self) -> list[str]:
        """As a list."""
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt


class TutorialRequest(_Strict):
    """POST / as the tutorial's FastAPI examples have it. `history` holds [question, answer] pairs or messages."""

    prompt: Text = Field(min_length=1)
    history: list[tuple[Text, Text] | ChatMessage] | None = Field(default=None, max_length=MAX_TURNS // 2 - 1)
    max_length: Annotated[int, Field(ge=1, le=2**31 - 1, description="longest answer in tokens"), _NUMBER] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=2**31 - 1), _NUMBER] | None = None
    temperature: Annotated[float, Field(ge=0, le=2), _NUMBER] | None = None
    top_p: Annotated[float, Field(gt=0, le=1), _NUMBER] | None = None

    def chat(self, model: str) -> ChatRequest:
        """The same as a chat request."""
        turns: list[ChatMessage] = []
        for turn in self.history or []:
            if isinstance(turn, ChatMessage):
                turns.append(turn)
            else:
                turns += [ChatMessage(role="user", content=turn[0]), ChatMessage(role="assistant", content=turn[1])]
        return ChatRequest(
            model=model,
            messages=[*turns, ChatMessage(role="user", content=self.prompt)],
            max_tokens=self.max_new_tokens or self.max_length,
            temperature=self.temperature,
            top_p=self.top_p,
        )

    def history_with(self, answer: str) -> list[Any]:
        """The history after this answer, in the form in which it came."""
        before = [
            t.model_dump(exclude_none=True) if isinstance(t, ChatMessage) else list(t) for t in self.history or []
        ]
        if self.history and isinstance(self.history[-1], ChatMessage):
            return [*before, {"role": "user", "content": self.prompt}, {"role": "assistant", "content": answer}]
        return [*before, [self.prompt, answer]]
