"""The judge: asked over real HTTP, again when it is away, and never a zero in its place."""

import logging
from typing import Any

import pytest

from tasks.errors import AccessError, DataError, SpecError, TransientError
from tasks.reinforce.judge import Judge
from tasks.reinforce.own import load_reward
from tasks.reinforce.said import Said
from tasks.specs import RewardSpec, change
from tests.ports import free_port
from tests.tasks.reinforce.judge_server import JudgeServer, judging

BATCH = [
    Said(question="富士山の高さは?", answer="3776 m", text=text, whole=text, num_tokens=3, is_finished=True)
    for text in ("3776 m です", "知りません")
]


def judge(server: JudgeServer, **changes: Any) -> Judge:
    return Judge.from_arguments({"url": server.url, "model": "m", "pause_s": 0.01, "tries": 3, **changes})


def test_scores_are_the_judges_numbers_of_its_range():
    with judging((200, "7"), (200, "Score: 12")) as server:
        assert judge(server, concurrency=1)(BATCH) == [0.7, 1.0]
    path, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    asked = body["messages"][0]["content"]
    assert all(text in asked for text in ("富士山の高さは?", "3776 m", "3776 m です", "to 10 "))


@pytest.mark.parametrize(
    ("said", "score"), [("7/10", 0.7), ("Score: 8 / 10", 0.8), ("３ out of 10", 0.3), ("一" * 400 + " 5", 0.5)]
)
def test_a_score_of_so_many_is_read(said: str, score: float):
    with judging((200, said)) as server:
        assert judge(server)(BATCH[:1]) == [score]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"url": "https://ada:pw@judge/v1", "model": "m"}, "url looks like a credential"),
        ({"url": "http://judge/v1", "model": "m", "api_key": "sk-123"}, "api_key looks like a credential"),
        ({"url": "http://judge/v1", "model": "m", "api_key_variable": "sk-123"}, "never the key itself"),
    ],
)
def test_a_key_in_a_recipe_is_refused_and_not_shown(arguments: dict[str, str], says: str):
    with pytest.raises(SpecError, match=says) as error:
        change(RewardSpec(name="judge"), {"arguments": arguments})
    assert "sk-123" not in str(error.value) and "pw" not in str(error.value)


def test_a_judge_that_could_ask_nobody_is_refused():
    with pytest.raises(SpecError, match="concurrency is 0, expected more than 0"):
        Judge.from_arguments({"url": "http://judge/v1", "model": "m", "concurrency": 0})


@pytest.mark.parametrize("first", [(503, "busy"), (429, "slow down"), (200, "a good answer")])
def test_it_is_asked_again(first: tuple[int, str]):
    with judging(first, (200, "5")) as server:
        assert judge(server)(BATCH[:1]) == [0.5]
        assert len(server.asked) == 2


@pytest.mark.parametrize("reply", [(503, "busy"), (200, "I can't say")])
def test_a_judge_that_stays_away_is_an_error_and_no_zero(reply: tuple[int, str]):
    with judging(reply) as server, pytest.raises(TransientError, match=r"no score in 3 tries.*a zero instead"):
        judge(server)(BATCH[:1])


def test_nobody_there_is_an_error_that_may_pass():
    address = f"http://127.0.0.1:{free_port()}/v1"
    asked = Judge.from_arguments({"url": address, "model": "m", "pause_s": 0.01, "tries": 2})
    with pytest.raises(TransientError, match="ConnectError"):
        asked(BATCH[:1])


def test_a_refusal_is_final():
    with judging((401, "no")) as server, pytest.raises(AccessError, match="answered 401"):
        judge(server)(BATCH[:1])
    with judging((404, "no such model")) as server, pytest.raises(DataError, match="404: no such model"):
        judge(server)(BATCH[:1])


def test_the_key_is_named_and_never_shown(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setenv("MY_JUDGE_KEY", "s3cret-value")
    with caplog.at_level(logging.DEBUG), judging((500, "x")) as server:
        asked = judge(server, api_key_variable="MY_JUDGE_KEY")
        with pytest.raises(TransientError) as error:
            asked(BATCH[:1])
    assert server.keys[0] == "Bearer s3cret-value"
    assert "s3cret-value" not in caplog.text + str(error.value) + repr(asked)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"model": "m"}, "needs url"),
        ({"url": "http://h/v1"}, "needs model"),
        ({"url": "h/v1", "model": "m"}, "must begin with http"),
        ({"url": "http://h/v1", "model": "m", "modle": 1}, "takes no argument 'modle'"),
        ({"url": "http://h/v1", "model": "m", "api_key_variable": "NOT_SET"}, "NOT_SET is not set"),
        ({"url": "http://h/v1", "model": "m", "instruction": "{nope}"}, "takes {question}, {answer}"),
    ],
)
def test_a_wrong_setting_is_said_before_the_run(arguments: dict[str, Any], says: str):
    with pytest.raises(SpecError, match=says.replace("{", r"\{")):
        load_reward(RewardSpec(name="judge", arguments=arguments))
