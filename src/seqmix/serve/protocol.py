"""What clients may send: the bodies of OpenAI's API that this server understands, and nothing else."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from seqmix.generate import JsonSchema, Language
from seqmix.generate.sampling import Sampling

Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Text = Annotated[str, Field(max_length=10_000_000)]


class Strict(BaseModel):
    """Wrong types, unknown fields and numbers that are not finite are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: bool = False


class Body(Strict):
    """What both kinds of requests have; `top_k` and `min_p` are additions to OpenAI's fields."""

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    n: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-(2**53), le=2**53)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = None  # taken, and of no effect

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, bias: dict[int, float]) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or 1.0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            bias=bias,
        )


class CompletionBody(Body):
    prompt: Text | Annotated[list[int], Field(min_length=1)]
    logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def top(self) -> int | None:
        return self.logprobs


class Message(Strict):
    role: Literal["system", "user", "assistant"]
    content: Text


class TextFormat(Strict):
    type: Literal["text"]

    def language(self) -> Language | None:
        return None


class ObjectFormat(Strict):
    type: Literal["json_object"]

    def language(self) -> Language | None:
        return JsonSchema({"type": "object"})


class NamedSchema(Strict):
    """`strict` is taken and of no effect: answers always follow the schema."""

    name: Text
    description: Text | None = None
    content: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    type: Literal["json_schema"]
    json_schema: NamedSchema

    def language(self) -> Language | None:
        return JsonSchema(self.json_schema.content)


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class ChatBody(Body):
    messages: list[Message] = Field(min_length=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1)
    response_format: ResponseFormat | None = None

    @property
    def top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
