"""The `Filter` on an OpenAI-compatible server: the same questions and the same verdicts as the built-in engine.

The request holds the answer to the two words where the server can (`structured_outputs`, as vLLM's server takes it) and
asks for the first token's log-probabilities. A server that refuses these extras is asked again without them, once and
for all; its answer must then still be exactly one of the two words.

Left out: retries and deadlines over several tries (the judges' actor has them).
"""

from dataclasses import replace
from typing import Any

import httpx
import numpy as np

from rlhf.data.media import encode_base64
from rlhf.rewards.config import FilterJudgeConfig
from rlhf.rewards.filters import VERDICTS, build_messages, decide, pass_probability, reason_messages, shrink
from rlhf.rewards.protocols import JudgeError
from rlhf.types import Verdict

_EXTRAS: dict[str, Any] = {"logprobs": True, "top_logprobs": 20, "structured_outputs": {"choice": list(VERDICTS)}}


class APIFilter:
    """A `Filter` that asks `judge.api_base` (for example http://host:8170/v1) for the model `judge.model_name`."""

    name = "filter"
    device = "remote"

    def __init__(self, judge: FilterJudgeConfig, *, api_key: str | None = None) -> None:
        assert judge.api_base is not None
        self.config = judge
        self.version = f"{judge.model_name}@{judge.api_base}"
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        base = judge.api_base.rstrip("/") + "/"
        self._client = httpx.AsyncClient(base_url=base, headers=headers, timeout=judge.api_timeout_s)
        self._extras = _EXTRAS

    async def judge(self, image: np.ndarray, source: np.ndarray | None, prompt: str) -> Verdict:
        """See `Filter.judge`. Raises: JudgeError also where the server refuses, fails or does not answer in time."""
        pictures = [encode_base64(shrink(picture)) for picture in (source, image) if picture is not None]
        messages = build_messages(self.config.system_prompt, has_source=source is not None, prompt=prompt)
        choice = await self._ask(messages, pictures, max_tokens=8, extras=self._extras)
        probability = pass_probability(first) if (first := _first_token(choice)) else None
        verdict = decide(_text(choice), probability, self.config.min_pass_probability)
        if verdict.valid or not self.config.max_reason_tokens:
            return verdict
        messages = reason_messages(messages, self.config.reason_prompt)
        reason = await self._ask(messages, pictures, max_tokens=self.config.max_reason_tokens)
        return replace(verdict, reason=_text(reason).strip())

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(
        self,
        messages: list[dict[str, Any]],
        pictures: list[str],
        *,
        max_tokens: int,
        extras: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        body = {
            "model": self.config.model_name,
            "messages": _with_pictures(messages, pictures),
            "temperature": 0.0,
            "max_tokens": max_tokens,
        } | (extras or {})
        try:
            response = await self._client.post("chat/completions", json=body)
            if extras and response.status_code in (400, 422):
                choice = await self._ask(messages, pictures, max_tokens=max_tokens)
                self._extras = {}  # only once the plain request was taken: the fault may have been another
                return choice
            response.raise_for_status()
            choice = response.json()["choices"][0]
        except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
            raise JudgeError(f"the filter's server {self.config.api_base}: {type(error).__name__}: {error}") from error
        return choice


def _with_pictures(messages: list[dict[str, Any]], pictures: list[str]) -> list[dict[str, Any]]:
    """The conversation in OpenAI's form: each `{"type": "image"}` becomes a data URL, in order."""
    remaining = iter(pictures)
    filled = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{next(remaining)}"}}
                if part["type"] == "image"
                else part
                for part in content
            ]
        filled.append({**message, "content": content})
    return filled


def _text(choice: dict[str, Any]) -> str:
    text = (choice.get("message") or {}).get("content")
    if not isinstance(text, str):
        raise JudgeError(f"the filter's server answered without text: {str(choice)[:200]}")
    return text


def _first_token(choice: dict[str, Any]) -> list[tuple[str, float]]:
    content = (choice.get("logprobs") or {}).get("content") or []
    return [(entry["token"], float(entry["logprob"])) for entry in content[0]["top_logprobs"]] if content else []
