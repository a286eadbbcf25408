"""`tatara generate`: the text of transformers' own generate, piece by piece, and the figures behind it."""

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deployments import cli
from deployments.generate import local, remote
from deployments.generate.wish import Told, Wish
from tasks.errors import MissingError, ServiceError, SpecError, TataraError, TransientError
from tests.deployments.lite.taught import CHATS, teach
from tests.ports import free_port
from tests.tiny import save_model
from tests.waiting import wait_for

pytestmark = pytest.mark.long

UPSTREAM = Path(__file__).parents[1] / "gateway" / "upstream_server.py"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows two chats by heart, and ends them."""
    return Path(teach(tmp_path_factory.mktemp("model") / "taught"))


def said_by_transformers(model: Path, prompt: str, num_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    whole = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    made = whole.generate(ids, max_new_tokens=num_tokens, do_sample=False)  # pyright: ignore
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


def test_the_text_streams_to_stdout_and_the_figures_to_stderr(model: Path, capfd: pytest.CaptureFixture[str]):
    words = ["generate", "--model", str(model), "--prompt", "hello there", "--max-tokens", "24", "--device", "cpu"]
    assert cli.main(words) == 0
    said = capfd.readouterr()
    assert said.out == said_by_transformers(model, "hello there", 24) + "\n"
    assert said.err.startswith(f"model {model}\n")
    figures = r"\d+ tokens after 11 of the prompt, [\d.]+ tokens/s, first after [\d.]+ s, "
    assert re.search(figures + r"host memory at most [\d.]+ GB, stopped by (eos|length)\n$", said.err)


def test_a_chat_goes_through_the_template_and_ends_by_its_end_token(model: Path):
    told = Told()
    pieces = list(local.say(str(model), Wish(prompt="hi", max_tokens=200, chat=True, device="cpu"), told))
    assert "".join(pieces) == "\n\n".join(CHATS["hi"])  # reasoning, answer; no markers of the format
    assert "こ" in pieces and "ん" in pieces  # it streams: character by character, without waiting for a space
    assert told.stopped_by == "eos" and 1 < told.num_tokens < 200
    assert 0 < told.first_token_s < told.seconds


def test_a_seed_repeats_a_draw_and_another_one_draws_another(model: Path):
    def say(seed: int) -> str:
        wish = Wish(prompt="x", max_tokens=16, temperature=1.9, top_p=0.99, seed=seed, device="cpu")
        told = Told()
        text = "".join(local.say(str(model), wish, told))
        assert told.num_tokens == 16 or told.stopped_by == "eos"
        return text

    assert say(1) == say(1) != say(2)


def test_who_stops_listening_stops_the_model(model: Path):
    for seed in range(1, 30):  # which draw is a long one differs between processors
        wish = Wish(prompt="x", max_tokens=400, temperature=1.9, seed=seed, device="cpu")
        told, cut = Told(), Told()
        list(local.say(str(model), wish, told))
        if told.num_tokens > 200:
            break
    pieces = local.say(str(model), wish, cut)
    next(pieces)
    start = time.monotonic()
    pieces.close()  # type: ignore[attr-defined]  # a generator
    assert told.num_tokens > 200 and time.monotonic() - start < told.seconds / 4
    assert cut.num_tokens == 0


def test_the_memory_is_drawn(model: Path, tmp_path: Path):
    picture = tmp_path / "memory.png"
    told = Told()
    list(local.say(str(model), Wish(prompt="hi", max_tokens=8, device="cpu"), told, picture))
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert told.where == "host" and told.peak_bytes > 100e6


def without_tokenizer(model: Path, folder: Path) -> Path:
    save_model(folder)
    for path in folder.glob("*token*"):
        path.unlink()
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", ""], "--prompt '' is empty"),
        (["--prompt", "x\udcff"], "--prompt 'x\\udcff' is not UTF-8"),
        (["--prompt", "x", "--seed", str(2**63)], f"--seed {2**63}: expected 0 to {2**63 - 1}"),
        (["--prompt", "x", "--max-tokens", "0"], "--max-tokens 0: expected 1 or more"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1: expected 0 or more"),
        (["--prompt", "x", "--top-p", "0"], "--top-p 0: expected more than 0"),
        (["--prompt", "x", "--model", "tinny"], "there is no model 'tinny'"),
        (["--prompt", "x", "--url", "127.0.0.1:8000"], "is no address: expected http://host:port"),
        (["--prompt", "x", "--url", "http://127.0.0.1:9", "--memory-picture", "m.png"], "drop one"),
    ],
)
def test_what_can_not_be_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["generate", *words]) == 1
    said = capsys.readouterr()
    assert message in said.err and said.err.count("\n") == 1 and said.out == ""


def test_no_tokenizer_no_template_no_room_no_gpu(model: Path, tmp_path: Path):
    def refuse(place: Path, error: type[TataraError], message: str, **wish: object) -> None:
        with pytest.raises(error, match=message):
            list(local.say(str(place), Wish(**{"prompt": "x", "device": "cpu", **wish}), Told()))  # type: ignore[arg-type]

    refuse(without_tokenizer(model, tmp_path / "bare"), MissingError, "bare has no tokenizer")
    refuse(tmp_path / "none", MissingError, "none can't be opened")
    refuse(model, SpecError, r"1 tokens and --max-tokens is 512, .* holds 512: .* ask for 511", max_tokens=512)
    if not torch.cuda.is_available():
        refuse(model, MissingError, "torch sees no GPU", device="cuda")
    plain = save_model(tmp_path / "plain")
    for path in plain.glob("chat_template*"):
        path.unlink()
    refuse(plain, SpecError, "has no chat template: leave --chat out", chat=True)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """What answers as vLLM does."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(UPSTREAM), str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_up(url), 60)
        yield url
    finally:
        process.kill()
        process.wait()


def is_up(url: str) -> bool:
    try:
        return bool(remote.get_json(f"{url}/v1/models", 5))
    except TransientError:
        return False


@pytest.mark.parametrize("chat", [False, True])
def test_the_same_from_an_endpoint(endpoint: str, chat: bool):
    told = Told()
    pieces = list(remote.say(f"{endpoint}/v1/", "latest", Wish(prompt="x", chat=chat, seed=3), told))
    assert "".join(pieces).removeprefix("考え") == "祭りは fun!" and len(pieces) > 3
    assert (told.num_prompt_tokens, told.num_tokens, told.stopped_by) == (3, 5, "eos")
    seen = remote.get_json(f"{endpoint}/seen", 5)["requests"][-1]
    assert seen["path"] == ("/v1/chat/completions" if chat else "/v1/completions")
    assert seen["body"]["seed"] == 3 and seen["body"]["stream"] is True
    assert ("messages" in seen["body"]) is chat


def test_the_key_comes_from_the_environment(endpoint: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TATARA_GATEWAY_KEY", "k-123")
    list(remote.say(endpoint, "", Wish(prompt="x"), Told()))
    assert remote.get_json(f"{endpoint}/seen", 5)["requests"][-1]["headers"]["authorization"] == "Bearer k-123"


def test_a_model_that_is_not_served_and_a_server_that_is_away(endpoint: str):
    with pytest.raises(MissingError, match=r"serves .*, not 'other': name one"):
        list(remote.say(endpoint, "other", Wish(prompt="x"), Told()))
    with pytest.raises(TransientError, match="does not answer"):
        list(remote.say(f"http://127.0.0.1:{free_port()}", "", Wish(prompt="x"), Told()))
    assert issubclass(ServiceError, TataraError)
