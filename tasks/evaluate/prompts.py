"""Turn questions into tokens: what is put before the model, and each continuation that is scored.

    Suite + a model folder's tokenizer -> render_suite() -> Prompts -> measure.py

A prompt is rendered as training and vLLM render it. In harmony it goes on to `<|channel|>final<|message|>`,
so that the answer itself is measured and not how long a model thinks before it.

Ring: edge (transformers' tokenizer, the question files).
"""

from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tasks import files
from tasks.errors import CorruptError, MissingError
from tasks.evaluate.suite import INSTRUCTION, Question, SafetyQuestion, parse
from tasks.pack.render import Tokenizer, render_chats
from tasks.specs import EvaluateSpec, PackSpec

SHIPPED = Path(__file__).resolve().parents[2] / "data" / "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class Suite:
    """All questions; `digest` names them."""

    questions: list[Question]
    safety: list[SafetyQuestion]
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One thing that is asked: its prompt, the continuations to score, whether to generate too."""

    prompt_ids: list[int]
    continuations: list[list[int]]
    is_generated: bool = False

    def values(self) -> dict[str, Any]:  # Any: JSON values
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """The suite in one model's tokens."""

    questions: list[Item]
    safety: list[Item]
    stop_ids: list[int]
    vocabulary: str  # digest: only models with the same one are asked the same validation documents
    tokenizer: Any  # Any: transformers has one class per family

    def text(self, ids: list[int]) -> str:
        """Return what generated ids say, up to the first token that ends the answer."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return self.tokenizer.decode(ids[:end], skip_special_tokens=True).strip()


def load_suite(spec: EvaluateSpec) -> Suite:
    """Read the question files that `spec` names. Raises MissingError or DataError naming the file."""
    folder = SHIPPED if spec.questions == "shipped" else Path(spec.questions).expanduser()
    texts: dict[str, str] = {}
    for name in ("questions.jsonl", "safety.jsonl"):
        path = folder / name
        if not path.is_file():
            raise MissingError(f"{path} is not there: EvaluateSpec.questions names a folder with both files")
        texts[name] = path.read_text(encoding="utf-8")
    digest = sha256("\0".join([INSTRUCTION, *texts.values()]).encode()).hexdigest()
    questions = parse(Question, texts["questions.jsonl"].splitlines(), str(folder / "questions.jsonl"))
    safety = parse(SafetyQuestion, texts["safety.jsonl"].splitlines(), str(folder / "safety.jsonl"))
    return Suite(questions=questions, safety=safety, digest=digest)


def render_suite(folder: Path, suite: Suite, pack: PackSpec) -> Prompts:
    """Render every question with the tokenizer of a model folder; `pack` holds system prompt and pinned date."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)  # Any: see Prompts
    asked = [f"{question.question}\n{INSTRUCTION}" for question in suite.questions]
    prompts, closing = _openings(tokenizer, [*asked, *(question.prompt for question in suite.safety)], pack)
    offered = [question.choices for question in suite.questions]
    offered += [(question.refusal, question.answer) for question in suite.safety]
    texts = [text for choices in offered for text in choices]
    ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
    items = [
        Item(prompt_ids=prompt, continuations=[list(next(ids)) for _ in choices], is_generated=True)
        for prompt, choices in zip(prompts, offered, strict=True)
    ]
    ends = {*closing, *(_config_stops(folder)), *([tokenizer.eos_token_id] if tokenizer.eos_token_id else [])}
    words = "\n".join(f"{token}\t{id}" for token, id in sorted(tokenizer.get_vocab().items()))
    return Prompts(
        questions=items[: len(suite.questions)],
        safety=items[len(suite.questions) :],
        stop_ids=sorted(ends),
        vocabulary=sha256(words.encode()).hexdigest(),
        tokenizer=tokenizer,
    )


def _openings(tokenizer: Tokenizer, asked: list[str], pack: PackSpec) -> tuple[list[list[int]], set[int]]:
    """Return each prompt up to where the answer's own text begins, and the token that closes an answer."""
    answer = "0"  # any text: where it begins and ends is what counts
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": answer}] for text in asked]
    rows = [{"row_id": str(index), "messages": chat} for index, chat in enumerate(chats)]
    documents = render_chats(rows, tokenizer, pack)
    [text_ids] = tokenizer([answer], add_special_tokens=False)["input_ids"]
    prompts: list[list[int]] = []
    closing: set[int] = set()
    for document in documents:
        place = _find(document.answer_ids, text_ids)
        if place < 0:
            raise CorruptError(
                "the chat template does not write the answer as it is given: its choices can't be scored"
            )
        prompts.append(document.prompt_ids + document.answer_ids[:place])
        closing.update(document.answer_ids[place + len(text_ids) :][:1])
    return prompts, closing


def _find(ids: list[int], wanted: list[int]) -> int:
    places = range(len(ids) - len(wanted), -1, -1)  # from the end: a channel's name may hold the same token
    return next((place for place in places if ids[place : place + len(wanted)] == wanted), -1)


def _config_stops(folder: Path) -> list[int]:
    """Return the end tokens of generation_config.json: vLLM stops there too."""
    path = folder / "generation_config.json"
    stops = files.read_json(path).get("eos_token_id") if path.is_file() else None
    return [stops] if isinstance(stops, int) else list(stops or [])
