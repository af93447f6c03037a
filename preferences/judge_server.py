"""OpenAI-compatible servers as judges; what goes wrong with one is a message that never holds the key to it."""

import os
from urllib.parse import urlsplit

import httpx
import openai
from omegaconf import DictConfig
from pydantic import BaseModel, Field, ValidationError

NO_KEY = "none"  # servers without a key take any
PROBE_SECONDS = 10.0
SHOWN = 200


class JudgeFailed(RuntimeError):
    """A judge that gave no answer; the message names its address, what it said, and the remedy."""


class Message(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    message: Message


class Usage(BaseModel):
    total_tokens: int | None = None


class Completion(BaseModel):
    """What is read of a server's answer to a question."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None


class Model(BaseModel):
    id: str


class Models(BaseModel):
    """What is read of a server's list of models; Ollama without any gives null."""

    data: list[Model] | None


class Access:
    """A server's address and the key to it.

    Of the client's exceptions only what `explain` says is passed on: their text holds what a server sent, and some send
    the key back.

    Raises:
        JudgeFailed: when the key cannot be one.
    """

    def __init__(self, address: str, key_variable: str):
        self._judge, self._variable = f"judge {address}", key_variable
        self._key = os.environ.get(key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise JudgeFailed(f"{self._judge}: {self._source()} holds signs that no key has; correct it")

    @property
    def key(self) -> str:
        return self._key or NO_KEY

    def _source(self) -> str:
        return f"the environment variable {self._variable} (algorithm.judge.api_key_env)"

    def _shown(self, text: str) -> str:
        return (text.replace(self._key, "***") if self._key else text).strip()[:SHOWN]

    def _said(self, response) -> str:
        request = response.request
        return (
            f"{self._judge}: status {response.status_code}, {self._shown(response.text)!r} after {request.method} "
            f"{request.url.path}"
        )

    def completion(self, response) -> tuple[str, int]:
        """The answer to a question, and the tokens of both.

        Raises:
            JudgeFailed: when the server gave something else.
        """
        found = self._read(Completion, response)
        return found.choices[0].message.content or "", (found.usage and found.usage.total_tokens) or 0

    def models(self, response) -> list[str]:
        """The names of what a server serves, one at least.

        Raises:
            JudgeFailed: when it serves nothing, or gave something else.
        """
        served = [model.id for model in self._read(Models, response).data or ()]
        if not served:
            raise JudgeFailed(f"{self._judge}: serves no model; start it with one")
        return served

    def _read(self, kind: type[BaseModel], response) -> BaseModel:
        try:
            return kind.model_validate_json(response.text)
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            words = ": ".join([*map(str, fault["loc"]), fault["msg"]])
            raise JudgeFailed(
                f"{self._said(response.http_response)}, which is no answer of OpenAI's API ({words}); look at the "
                "server, or correct the address, which mostly ends in /v1"
            ) from None

    def explain(self, error: openai.APIError) -> str:
        """A failed call in a sentence: the address, the status, what the server said, and the remedy."""
        if isinstance(error, openai.APITimeoutError):
            remedy = "raise algorithm.judge.timeout_s or lower algorithm.judge.concurrency"
            return f"{self._judge}: no answer in time; {remedy}"
        if isinstance(error, openai.APIConnectionError):
            cause = self._shown(str(error.__cause__ or error))
            return f"{self._judge}: cannot be reached ({cause}); start it, or correct the address"
        if not isinstance(error, openai.APIStatusError):
            return f"{self._judge}: {self._shown(str(error))}"
        said = self._said(error.response)
        if error.status_code in (401, 403):
            return f"{said}; {self._source()} {'holds a key that it refuses' if self._key else 'has no value'}"
        if error.status_code == 429:
            return f"{said}; lower algorithm.judge.concurrency or raise algorithm.judge.retries"
        return said


class Server:
    """A server, asked through openai's client, which tries again with growing pauses."""

    def __init__(self, address: str, model: str | None, settings: DictConfig):
        self._access = Access(address, settings.api_key_env)
        self._model, self._settings = model, settings
        self._client = openai.AsyncOpenAI(
            base_url=address, api_key=self._access.key, max_retries=settings.retries, timeout=settings.timeout_s
        )

    async def ask(self, question: str) -> tuple[str, int]:
        """The answer to a question, and the tokens of both.

        Raises:
            JudgeFailed: with the server's address and what it said.
        """
        try:
            if self._model is None:
                self._model = self._access.models(await self._client.models.with_raw_response.list())[0]
            response = await self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=[{"role": "user", "content": question}],
                temperature=self._settings.temperature,
                max_tokens=self._settings.max_tokens,
            )
        except openai.APIError as error:
            raise JudgeFailed(self._access.explain(error)) from None
        return self._access.completion(response)


def is_address(text: str) -> bool:
    """Whether a server could be asked there."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(httpx.URL(text).host) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        return False


def probe(address: str, model: str | None, key_variable: str) -> None:
    """Asks a server what it serves, before anything is started.

    Raises:
        JudgeFailed: when it does not answer, wants another key, or does not serve the model.
    """
    access = Access(address, key_variable)
    client = openai.OpenAI(base_url=address, api_key=access.key, max_retries=0, timeout=PROBE_SECONDS)
    try:
        served = access.models(client.models.with_raw_response.list())
    except openai.NotFoundError:
        if model is None:
            raise JudgeFailed(f"judge {address}: has no list of models; name one in algorithm.judge.models") from None
        return
    except openai.APITimeoutError:
        raise JudgeFailed(
            f"judge {address}: did not say within {PROBE_SECONDS:g} seconds what it serves; wait until it has started, "
            "or correct the address"
        ) from None
    except openai.APIError as error:
        raise JudgeFailed(access.explain(error)) from None
    if model is not None and model not in served:
        raise JudgeFailed(f"judge {address}: serves {', '.join(served)}, and not algorithm.judge.models={model!r}")
