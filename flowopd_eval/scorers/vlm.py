"""A judge behind an OpenAI-compatible server: one question about one picture, its answer or a token's probabilities.

Sends ``POST BASE/chat/completions`` as OpenAI's API reference has it ("Create chat completion"), which vLLM, SGLang and
others also serve. The standard library's client is enough for it, and brings no dependency.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from flowopd_eval.errors import RequestError

if TYPE_CHECKING:
    from PIL import Image

TOP_LOGPROBS = 20  # the most that OpenAI's API gives, and vLLM's default --max-logprobs
KEY_VARIABLE = "OPENAI_API_KEY"
TRANSIENT = frozenset({408, 429, 500, 502, 503, 504})
_REMEDIES = {
    401: f"Set {KEY_VARIABLE} to a key of this server.",
    404: "Check --judge-model, and that --judge-url is the base URL (http://localhost:8000/v1).",
    429: "The server asks for fewer requests: try again later.",
}


@dataclass(frozen=True)
class Reply:
    """``model`` as the server names it; the likeliest first ``tokens`` of the answer with their natural log-probs."""

    model: str
    tokens: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Answer:
    """``model`` as the server names it; the ``text`` of its answer, ``cut`` where it reached the most tokens."""

    model: str
    text: str
    cut: bool


def picture_url(image: Image.Image) -> str:
    """The picture as a PNG data URL (lossless, RGB)."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


class VLMClient:
    """Asks a vision-language model; safe to use from several threads.

    The key comes from the environment variable ``OPENAI_API_KEY``; local servers need none. Credentials that stand in
    the URL (``https://user:password@host``) are sent as basic authentication in its place.

    Args:
        base_url: up to and with the version: ``http://localhost:8000/v1``. ``url`` is the same without credentials.
        model: the model's name on the server.
        timeout: seconds without a byte from the server after which an attempt has failed.
        attempts: tries per question when the server is busy, broken or out of reach (408, 429, 5xx, no connection).
        backoff: seconds before the second attempt, doubled with each further one; ``Retry-After`` may prolong it to 60.

    Raises:
        RequestError: ``base_url`` is no HTTP URL.
    """

    def __init__(self, base_url: str, model: str, timeout: float = 120, attempts: int = 4, backoff: float = 1) -> None:
        parts = urlsplit(base_url)
        user, _, host = parts.netloc.rpartition("@")
        if parts.scheme not in ("http", "https") or not host:
            raise RequestError("--judge-url: expected the server's base URL, as in http://localhost:8000/v1.")
        self.model, self.timeout, self.attempts, self.backoff = model, timeout, attempts, backoff
        path = parts.path.rstrip("/")
        self.url = urlunsplit((parts.scheme, host, path, "", ""))
        self._endpoint = urlunsplit((parts.scheme, host, f"{path}/chat/completions", parts.query, ""))
        key = os.environ.get(KEY_VARIABLE, "").strip()
        self._secrets = [secret for secret in (key, user, parts.query) if secret]
        self._headers = {"Content-Type": "application/json"}
        if user:
            self._headers["Authorization"] = "Basic " + base64.b64encode(unquote(user).encode()).decode()
        elif key:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = build_opener(_NoRedirect)

    def ask(self, picture: str, question: str) -> Reply:
        """The likeliest first tokens of the answer to ``question`` about ``picture`` (:func:`picture_url`).

        Raises:
            RequestError: no connection, a refusal, an answer that is no chat completion or has no log-probs.
        """
        return self._reply(self._complete(picture, question, max_tokens=1, logprobs=True, top_logprobs=TOP_LOGPROBS))

    def answer(self, picture: str, question: str, max_tokens: int) -> Answer:
        """The likeliest answer to ``question`` about ``picture``, of at most ``max_tokens`` tokens.

        Raises:
            RequestError: no connection, a refusal, an answer that is no chat completion or has no text.
        """
        raw = self._complete(picture, question, max_tokens=max_tokens)
        try:
            completion = json.loads(raw)
            choice = completion["choices"][0]
            text, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
            model = str(completion.get("model") or self.model)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._no_completion(raw) from error
        if not isinstance(text, str):
            raise self._error(f"the answer has no text, but {text!r:.120}.")
        return Answer(model, text, cut)

    def _complete(self, picture: str, question: str, **settings: Any) -> bytes:
        content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": question}]
        body = {"model": self.model, "messages": [{"role": "user", "content": content}], "temperature": 0, **settings}
        return self._post(json.dumps(body).encode())

    def _post(self, body: bytes) -> bytes:
        for attempt in range(self.attempts):
            wait = self.backoff * 2**attempt
            try:
                with self._opener.open(Request(self._endpoint, body, self._headers), timeout=self.timeout) as response:
                    return response.read()
            except HTTPError as error:
                problem, remedy = _refusal(error), _REMEDIES.get(error.code, "The server's log should say more.")
                if error.code not in TRANSIENT:
                    break
                with suppress(ValueError):  # Retry-After may also be a date: the backoff is enough then
                    wait = max(wait, min(float(error.headers.get("Retry-After", 0)), 60.0))
            except (OSError, HTTPException) as error:
                problem = str(getattr(error, "reason", None) or error or type(error).__name__)
                remedy = f"Start the server (`vllm serve {self.model}`), or correct --judge-url."
            if attempt + 1 < self.attempts:
                time.sleep(wait)
        raise self._error(f"{problem}. {remedy}")

    def _reply(self, raw: bytes) -> Reply:
        try:
            answer = json.loads(raw)
            content = (answer["choices"][0].get("logprobs") or {}).get("content")
            candidates: list[Any] = (content[0].get("top_logprobs") or []) if content else []
            reply = Reply(
                str(answer.get("model") or self.model),
                tuple((str(each["token"]), float(each["logprob"])) for each in candidates),
            )
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._no_completion(raw) from error
        if not reply.tokens:
            raise self._error("the answer has no log-probs. Take a server and model that give top_logprobs, as vLLM's.")
        return reply

    def _no_completion(self, raw: bytes) -> RequestError:
        return self._error(f"no chat completion came back, but {raw[:120].decode(errors='replace')!r}.")

    def _error(self, text: str) -> RequestError:
        for secret in self._secrets:  # a server may repeat a wrong key
            text = text.replace(secret, "…")
        return RequestError(f"{self.url}/chat/completions: {text}")


class _NoRedirect(HTTPRedirectHandler):
    """The key goes to the named host only."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _refusal(error: HTTPError) -> str:
    text = ""
    with suppress(OSError, HTTPException), error:
        text = error.read(2000).decode(errors="replace")
    return f"HTTP {error.code} {' '.join(text.split())[:300]}".strip()
