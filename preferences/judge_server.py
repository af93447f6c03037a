"""OpenAI-compatible servers as judges; what goes wrong with one is a message that never holds the key to it."""

import asyncio
import ipaddress
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, Field, ValidationError

from recipe.spin.common.secrets import shown_address

# httpx2, or httpx with an older openai: what its clients are derived from
httpx = import_module(openai.DefaultHttpxClient.__base__.__module__)

NO_KEY = "none"  # servers without a key take any
PROBE_SECONDS = 10.0
SHOWN = 200
# Of a question: longer than the server's model takes, or not to the liking of a filter of contents
REFUSALS = (openai.BadRequestError, openai.UnprocessableEntityError)
# What an answer holds that ended so is no verdict, but reasoning towards one
UNFINISHED = {"length": "cut", "content_filter": "refused"}


class Judge(NamedTuple):
    """A server: its address, the model to ask it for (None: the first that it serves), and the environment variable
    that holds the key to it (None: it gets no key)."""

    address: str
    model: str | None
    key_variable: str | None


class JudgeFailed(RuntimeError):
    """A judge that gave no answer; the message names its address, what it said, and the remedy."""


class Answer(NamedTuple):
    """A judge's answer to a question, the tokens of both, and why it holds no verdict, whatever its text says.

    fault: "cut" where a limit of its length cut it off, "refused" where the server would not answer this question
        (`text` is what it said then) or not to the end, and else empty.
    """

    text: str
    tokens: int
    fault: str = ""


class Message(BaseModel):
    content: str | None = None


class Choice(BaseModel):
    message: Message
    finish_reason: str | None = None


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


class LimitedClient(openai.DefaultAsyncHttpxClient):
    """httpx's client with limits of whole calls: its own are of each read, and a server that sends a blank line now and
    then while a request waits would never be given up."""

    async def send(self, request, **options):
        limit = _seconds(request)
        try:
            return await asyncio.wait_for(super().send(request, **options), limit)
        except asyncio.TimeoutError as error:
            raise httpx.ReadTimeout(f"no whole answer in {limit:g} seconds", request=request) from error


class Access:
    """A server's address and the key to it; what a message shows of both holds neither the key nor a password.

    Of the client's exceptions only what `explain` says is passed on: their text holds what a server sent, and some send
    the key back.

    Raises:
        JudgeFailed: when the key cannot be one.
    """

    def __init__(self, judge: Judge):
        self._address, self._variable = judge.address, judge.key_variable
        self.judge = f"judge {shown_address(judge.address)}"
        self._key = "" if judge.key_variable is None else os.environ.get(judge.key_variable, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise JudgeFailed(f"{self.judge}: {self._source()} holds signs that no key has; correct it")

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns what openai's client raises into JudgeFailed."""
        try:
            yield
        except openai.APIError as error:
            raise JudgeFailed(self.explain(error)) from None

    def client(self, **options) -> openai.AsyncOpenAI:
        """A client of openai's.

        A proxy that the environment names does not lead to this machine's own servers; certificates that it names hold
        for all.

        Raises:
            JudgeFailed: when the environment names a proxy or certificates that cannot be used.
        """
        try:
            http = LimitedClient(**self._way())
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise JudgeFailed(
                f"{self.judge}: no connection can be set up ({type(error).__name__}: {shown_address(str(error))}); "
                "proxies are taken from HTTP_PROXY, HTTPS_PROXY and ALL_PROXY, certificates from SSL_CERT_FILE and "
                "SSL_CERT_DIR: correct them, or name the judge's host in NO_PROXY"
            ) from None
        return openai.AsyncOpenAI(base_url=self._address, api_key=self._key or NO_KEY, http_client=http, **options)

    def _way(self) -> dict[str, Any]:
        if not is_local(self._address):
            return {}
        secure = urlsplit(self._address).scheme == "https"
        return {"trust_env": False} | ({"verify": httpx.create_ssl_context()} if secure else {})

    def _source(self) -> str:
        return f"the environment variable {self._variable} (algorithm.judge.api_key_env)"

    def _shown(self, text: str) -> str:
        return self._masked(text).strip()[:SHOWN]

    def _masked(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _said(self, response) -> str:
        request = response.request
        return (
            f"{self.judge}: status {response.status_code}, {self._shown(response.text)!r} after {request.method} "
            f"{request.url.path}"
        )

    def completion(self, response) -> Answer:
        """The answer to a question.

        Raises:
            JudgeFailed: when the server gave something else.
        """
        found = self._read(Completion, response)
        choice, tokens = found.choices[0], (found.usage and found.usage.total_tokens) or 0
        return Answer(self._masked(choice.message.content or ""), tokens, UNFINISHED.get(choice.finish_reason, ""))

    def models(self, response) -> list[str]:
        """The names of what a server serves, one at least.

        Raises:
            JudgeFailed: when it serves nothing, or gave something else.
        """
        served = [model.id for model in self._read(Models, response).data or ()]
        if not served:
            raise JudgeFailed(f"{self.judge}: serves no model; start it with one")
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
            return (
                f"{self.judge}: no answer within algorithm.judge.timeout_s={_seconds(error.request):g} seconds; raise "
                "it or lower algorithm.judge.concurrency"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = self._shown(str(error.__cause__ or error))
            proxy = proxy_to(self._address)
            way = f" through the proxy {proxy} of the environment" if proxy else ""
            remedy = "start it, or correct the address" + (", or name its host in NO_PROXY" if proxy else "")
            return f"{self.judge}: cannot be reached{way} ({cause}); {remedy}"
        if not isinstance(error, openai.APIStatusError):
            return f"{self.judge}: {self._shown(str(error))}"
        said = self._said(error.response)
        if error.status_code in (401, 403):
            if self._variable is None:
                return f"{said}; algorithm.judge.api_key_env names no variable with a key to it"
            return f"{said}; {self._source()} {'holds a key that it refuses' if self._key else 'has no value'}"
        if error.status_code == 429:
            return f"{said}; lower algorithm.judge.concurrency or raise algorithm.judge.retries"
        return said


class Server:
    """A server, asked through openai's client, which tries again with growing pauses."""

    def __init__(self, judge: Judge, settings: DictConfig):
        self._access = Access(judge)
        self._model, self._settings = judge.model, settings
        self._client = self._access.client(**patience(settings))

    async def ask(self, question: str) -> Answer:
        """The answer to a question; it says so where the server refuses one as too long, or by a filter of contents.

        Raises:
            JudgeFailed: with the server's address and what it said.
        """
        with self._access.explained():
            if self._model is None:
                self._model = self._access.models(await self._client.models.with_raw_response.list())[0]
            asked = request(self._model, question, self._settings)
            try:
                response = await self._client.chat.completions.with_raw_response.create(**asked)
            except REFUSALS as error:  # not of the parameters, which the probe sent as well
                return Answer(self._access.explain(error), 0, "refused")
        return self._access.completion(response)


def patience(settings: DictConfig) -> dict[str, Any]:
    """How often a client tries again, and the seconds for each try."""
    return {"max_retries": settings.retries, "timeout": settings.timeout_s}


def extra_body(settings: DictConfig) -> dict[str, Any]:
    """What `algorithm.judge.extra_body` holds."""
    return OmegaConf.to_container(settings.extra_body, resolve=True) if settings.extra_body else {}


def request(model: str, question: str, settings: DictConfig) -> dict[str, Any]:
    """What openai's client is asked with; what is null in `algorithm.judge.extra_body` is left out."""
    parameters = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
    parameters |= extra_body(settings)
    body = {name: value for name, value in parameters.items() if value is not None}
    return {"model": model, "messages": [{"role": "user", "content": question}], "extra_body": body}


def _seconds(request) -> float:
    """The time limit that openai's client put on a request."""
    return request.extensions["timeout"]["read"]


# ---------------------------------------------------------------------- addresses


def is_address(text: str) -> bool:
    """Whether a server could be asked there."""
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(httpx.URL(text).host) and parts.port != 0
    except (ValueError, httpx.InvalidURL):
        return False


def is_local(address: str) -> bool:
    """Whether a server is on this machine by its address."""
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def proxy_to(address: str) -> str | None:
    """The proxy that the environment names for a server, as messages show it."""
    parts, proxies = urlsplit(address), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_local(address) or proxy_bypass(parts.hostname or ""):
        return None
    return shown_address(proxy if "://" in proxy else f"http://{proxy}")


# ---------------------------------------------------------------------- before anything is started


def probe(judge: Judge, question: str, settings: DictConfig) -> Answer:
    """Asks a server what it serves, and then a question as the run will ask them; returns its answer.

    Raises:
        JudgeFailed: when it does not answer, wants another key, does not serve the model or refuses the parameters.
    """
    return asyncio.run(_probe(judge, question, settings))


async def _probe(judge: Judge, question: str, settings: DictConfig) -> Answer:
    access, model = Access(judge), judge.model
    async with access.client(max_retries=0, timeout=PROBE_SECONDS) as client:
        with access.explained():
            served = await _served(access, client, model, settings.retries)
        if model is None:
            model = served[0]
            sys.stderr.write(
                f"[spin] {access.judge} is asked for {model}, the first of the {len(served)} models that it serves; "
                "algorithm.judge.models names another\n"
            )
        elif served is not None and model not in served:
            raise JudgeFailed(f"{access.judge}: serves {', '.join(served)}, and not algorithm.judge.models={model!r}")
        asking = client.with_options(**patience(settings))
        with access.explained():
            try:
                asked = request(model, question, settings)
                response = await asking.chat.completions.with_raw_response.create(**asked)
            except REFUSALS as error:
                raise JudgeFailed(
                    f"{access.explain(error)}; algorithm.judge.extra_body replaces what it is asked with, and removes "
                    "what is null there"
                ) from None
    return access.completion(response)


async def _served(access: Access, client: openai.AsyncOpenAI, model: str | None, retries: int) -> list[str] | None:
    """The models that a server lists, one at least; None where it has no list and needs none."""
    try:
        try:
            listed = await client.models.with_raw_response.list()
        except (openai.RateLimitError, openai.InternalServerError):  # busy; one that is not there is said at once
            listed = await client.with_options(max_retries=retries).models.with_raw_response.list()
        return access.models(listed)
    except openai.NotFoundError:
        if model is None:
            raise JudgeFailed(f"{access.judge}: has no list of models; name one in algorithm.judge.models") from None
        return None
    except openai.APITimeoutError:
        raise JudgeFailed(
            f"{access.judge}: did not say within {PROBE_SECONDS:g} seconds what it serves; wait until it has started, "
            "or correct the address"
        ) from None
