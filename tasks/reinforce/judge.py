"""A reward from a judge: any OpenAI-compatible endpoint that scores an answer with a number.

    question + answer + reference -> POST url/chat/completions -> "7" -> 0.7

A judge that is away is asked again, and stays an error when it stays away: a zero would be learnt as a bad answer.
The key is named, never written: `api_key_variable` is the name of an environment variable of the worker.

Ring: edge (network).  Units: seconds.
"""

import math
import os
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

import httpx

from tasks.environment import read_secret
from tasks.errors import AccessError, DataError, SpecError, TransientError
from tasks.lifeline import lifeline
from tasks.reinforce.rewards import last_number
from tasks.reinforce.said import Said

INSTRUCTION = (
    "You grade an answer. Reply with one number from 0 (useless) to {most:g} (perfect) and nothing else.\n\n"
    "Question:\n{question}\n\nReference answer:\n{answer}\n\nAnswer to grade:\n{text}"
)
_OF_MOST = re.compile(r"(-?\d+(?:\.\d+)?)\s*(?:/|out of)\s*\d")
_LONGEST_PAUSE_S = 60.0
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Where the judge is and how patiently it is asked. Scores are the replied number / `most`, held within 0 and 1."""

    url: str
    model: str
    api_key_variable: str = ""
    instruction: str = INSTRUCTION
    most: float = 10.0
    timeout_s: float = 60.0
    tries: int = 6
    pause_s: float = 2.0  # before the second try; doubled before each further one
    concurrency: int = 8
    max_tokens: int = 256
    _key: str = field(default="", repr=False)

    @classmethod
    def from_arguments(cls, arguments: Mapping[str, Any]) -> "Judge":  # Any: JSON values
        """Build a judge from RewardSpec.arguments. Raises SpecError for a missing or unknown one, or a missing key."""
        takes = [each.name for each in fields(cls) if not each.name.startswith("_")]
        unknown = sorted(set(arguments) - set(takes))
        if unknown:
            raise SpecError(f"reward 'judge' takes no argument {unknown[0]!r}: it takes {', '.join(takes)}")
        missing = [name for name in ("url", "model") if not arguments.get(name)]
        if missing:
            raise SpecError(f"reward 'judge' needs {missing[0]}: url is such as http://host:8000/v1, model its name")
        if not str(arguments["url"]).startswith(("http://", "https://")):
            raise SpecError("reward 'judge': url must begin with http:// or https://")
        name = arguments.get("api_key_variable", "")
        key = read_secret(os.environ, name) if name else ""
        if name and not key:
            raise SpecError(f"reward 'judge': the environment variable {name} is not set where the trainer runs")
        try:
            judge = cls(**arguments, _key=key)
            judge.instruction.format(question="", answer="", text="", most=judge.most)
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise SpecError(
                f"reward 'judge': instruction takes {{question}}, {{answer}}, {{text}} and {{most}} only: {error}"
            ) from error
        least = {
            "most": judge.most,
            "tries": judge.tries,
            "concurrency": judge.concurrency,
            "timeout_s": judge.timeout_s,
        }
        if wrong := next((name for name, value in least.items() if value <= 0), ""):
            raise SpecError(f"reward 'judge': {wrong} is {least[wrong]}, expected more than 0")
        return judge

    def __call__(self, batch: Sequence[Said]) -> list[float]:
        """Return the judge's scores, 0 to 1. Raises TransientError when it stays away, AccessError for a wrong key."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        with (
            httpx.Client(headers=headers, timeout=self.timeout_s) as client,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            return list(pool.map(lambda said: self._score(client, said), batch))

    def _score(self, client: httpx.Client, said: Said) -> float:
        wait, fault = self.pause_s, ""
        for number in range(self.tries):
            lifeline.beat("judge", number)
            if number:
                time.sleep(min(wait, _LONGEST_PAUSE_S))
                wait *= 2
            try:
                reply = client.post(f"{self.url.rstrip('/')}/chat/completions", json=self._body(said))
            except httpx.TransportError as error:  # time-outs are these too
                fault = type(error).__name__
                continue
            if reply.status_code in (401, 403):
                raise AccessError(
                    f"the judge at {self.url} answered {reply.status_code}: check the key that api_key_variable names"
                )
            if reply.status_code in _AGAIN:
                fault = f"HTTP {reply.status_code}"
                wait = max(wait, _retry_after(reply))
                continue
            if reply.is_error:
                raise DataError(f"the judge at {self.url} answered {reply.status_code}: {reply.text[:200]}")
            score = _read_score(reply, self.most)
            if score is not None:
                return score
            fault = f"no number in {reply.text[:200]!r}"
        raise TransientError(
            f"the judge at {self.url} gave no score in {self.tries} tries (last: {fault}): a zero instead would be "
            "learnt; see that it is up, then run again"
        )

    def _body(self, said: Said) -> dict[str, Any]:  # Any: JSON values
        asked = self.instruction.format(question=said.question, answer=said.answer, text=said.text, most=self.most)
        messages = [{"role": "user", "content": asked}]
        return {"model": self.model, "messages": messages, "temperature": 0.0, "max_tokens": self.max_tokens}


def _read_score(reply: httpx.Response, most: float) -> float | None:
    try:
        text = reply.json()["choices"][0]["message"]["content"] or ""
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    of_most = _OF_MOST.search(unicodedata.normalize("NFKC", text))  # "7/10" is 7
    given = float(of_most[1]) if of_most else last_number(text)
    return None if given is None or not math.isfinite(given) else max(0.0, min(1.0, given / most))


def _retry_after(reply: httpx.Response) -> float:
    said = reply.headers.get("retry-after", "")
    return float(said) if said.isdecimal() else 0.0
