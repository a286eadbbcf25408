"""What is asked for, and what is told of it afterwards.

Ring: pure.  Units: tokens, seconds, bytes.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tasks.errors import SpecError

_MAX_SEED = (1 << 63) - 1  # torch's and vLLM's


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """A prompt and how it is to be continued."""

    prompt: str
    max_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    chat: bool = False
    device: str = "auto"
    dtype: str = "auto"

    @classmethod
    def of(cls, options: argparse.Namespace) -> Self:
        """Read the options. Raises SpecError that names what can't be."""
        faults = {
            f"--prompt {options.prompt!r} is empty: a model needs at least one token": not options.prompt,
            f"--prompt {options.prompt!r} is not UTF-8: convert it": not _is_unicode(options.prompt),
            f"--seed {options.seed}: expected 0 to {_MAX_SEED}": not 0 <= (options.seed or 0) <= _MAX_SEED,
            f"--max-tokens {options.max_tokens}: expected 1 or more": options.max_tokens < 1,
            f"--temperature {options.temperature:g}: expected 0 or more": not options.temperature >= 0,
            f"--top-p {options.top_p:g}: expected more than 0, at most 1": not 0 < options.top_p <= 1,
        }
        for said, is_fault in faults.items():
            if is_fault:
                raise SpecError(said)
        return cls(**{name: getattr(options, name) for name in cls.__slots__})  # type: ignore[attr-defined]  # slots=True

    @staticmethod
    def require_no_picture(picture: Path | None) -> None:
        """Raise SpecError for a picture of memory that another process holds."""
        if picture:
            raise SpecError(f"--memory-picture {picture} draws this process's memory, but --url asks another: drop one")


def _is_unicode(text: str) -> bool:
    """Say whether there is no byte in it that Python could not decode from the command line."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@dataclass(slots=True)
class Told:
    """What is known after the last token."""

    num_prompt_tokens: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    first_token_s: float = 0.0
    stopped_by: str = ""  # eos, length
    peak_bytes: int = 0
    where: str = ""  # GPU, host

    def line(self) -> str:
        """Return the figures on one line; what is not known is left out.

        >>> told = Told(num_prompt_tokens=3, num_tokens=20, seconds=1.25, first_token_s=0.3, stopped_by="length")
        >>> told.line()
        '20 tokens after 3 of the prompt, 16.0 tokens/s, first after 0.300 s, stopped by length'
        """
        parts = [f"{self.num_tokens} tokens after {self.num_prompt_tokens} of the prompt"]
        if self.seconds:
            parts.append(f"{self.num_tokens / self.seconds:.1f} tokens/s, first after {self.first_token_s:.3f} s")
        if self.peak_bytes:
            parts.append(f"{self.where} memory at most {self.peak_bytes / 1e9:.2f} GB")
        parts.append(f"stopped by {self.stopped_by}")
        return ", ".join(parts)
