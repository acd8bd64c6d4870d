"""What requests may ask for: OpenAI's fields that have an effect here, and those that would have none."""

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from .errors import ApiError

# Fields that are not done, and the values by which they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (),
}
_NO_EFFECT = ("metadata", "prompt_cache_key", "safety_identifier", "user")  # they say who asks, and change no answer


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(_Fields):
    """``include_usage``: one more chunk, with the counts."""

    include_usage: bool = False


Stop = Annotated[str, Field(min_length=1, max_length=1000)]
# A long list of what is no text has one error, not one for each.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]
NewTokens = Annotated[int | None, Field(ge=1, lt=2**31)]


class _Request(_Fields):
    """The fields of both kinds of requests; a field that is null is one that was not given."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, ge=0, le=1)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: NewTokens = None

    @model_validator(mode="before")
    @classmethod
    def _without_neutral_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if value is None or name in _NO_EFFECT or value in _NEUTRAL.get(name, ()) and not _is_zero(name, value):
                continue
            kept[name] = value
        return kept

    @property
    def stops(self) -> tuple[str, ...]:
        """The texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


def _is_zero(name, value):
    """``logprobs: 0`` asks for those of the tokens themselves; Python says that 0 is False."""
    return name == "logprobs" and value is not False


class CompletionRequest(_Request):
    """``POST /v1/completions``."""

    prompt: str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True)]
    echo: bool = False

    @property
    def new_tokens(self) -> int | None:
        """How many may be generated; as in OpenAI's interface 16 where nothing is said."""
        return 16 if self.max_tokens is None else self.max_tokens


class TextPart(_Fields):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(_Fields):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    @model_validator(mode="before")
    @classmethod
    def _without_nothing(cls, data: Any) -> Any:
        """Clients send an answer back as they got it, ``refusal`` and all."""
        return {name: x for name, x in data.items() if x is not None} if isinstance(data, dict) else data

    @property
    def text(self) -> str:
        """All of its parts."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Request):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: NewTokens = None

    @property
    def new_tokens(self) -> int | None:
        """How many may be generated; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class PromptSource(_Fields):
    """``PUT /admin/prompts/{name}``: a compiled prompt or an adapter, below the folder of the server's."""

    path: str = Field(min_length=1)
    task_id: int | None = None


Fields = TypeVar("Fields", bound=_Fields)


def parse(kind: type[Fields], body: bytes) -> Fields:
    """A request's body.

    Raises:
        ApiError: 400 that names the field.
    """
    try:
        return kind.model_validate(from_json(body, allow_inf_nan=False))
    except ValidationError as error:
        errors = error.errors()
        # Of a field that takes several types there is an error for each, most of them about the type.
        first = next((one for one in errors if not one["type"].endswith("_type")), errors[0])
        where = ".".join(str(part) for part in first["loc"] if isinstance(part, int) or part in _names(kind, first))
        message = first["msg"]
        if first["type"] == "extra_forbidden":
            message = (
                "this server does not know the field, or not this value of it, and ignores none that has an effect"
            )
        raise ApiError(400, f"{where}: {message}" if where else message, where or None, first["type"]) from None
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="json_invalid") from None


def _names(kind, error):
    """The parts of a location that are fields, not the alternatives of a union's type."""
    first = error["loc"][:1]
    return {*first, *kind.model_fields, *Message.model_fields, "include_usage"}
