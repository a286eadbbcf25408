"""Web pages: a browser asks for leave first, and shows an answer only where the server says so (CORS)."""

import httpx
import pytest

PAGE = "https://app.example.com"
PREFLIGHT = {
    "origin": PAGE,
    "access-control-request-method": "POST",
    "access-control-request-headers": "authorization,content-type",
}


@pytest.fixture
def open_gateway(start_gateway, upstream):
    return start_gateway(upstream.port, GATEWAY_ALLOWED_ORIGINS=f"{PAGE}, http://localhost:3000")


@pytest.mark.parametrize("stream", [False, True])
def test_a_page_that_may_ask_reads_the_answer_and_its_ids(open_gateway, chat_body, stream):
    asked = httpx.options(f"{open_gateway.url}/v1/chat/completions", headers=PREFLIGHT)
    assert asked.status_code == 200 and asked.headers["access-control-allow-origin"] == PAGE
    assert "authorization" in asked.headers["access-control-allow-headers"].lower()
    assert "POST" in asked.headers["access-control-allow-methods"]
    answer = httpx.post(
        f"{open_gateway.url}/v1/chat/completions", json=chat_body(stream=stream), headers={"origin": PAGE}
    )
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    shown = answer.headers["access-control-expose-headers"]
    assert "x-request-id" in shown and "x-tatara-model-digest" in shown and answer.headers["x-request-id"]
    assert httpx.get(f"{open_gateway.url}/v1/models", headers={"origin": PAGE}).headers["access-control-allow-origin"]


def test_a_refusal_is_readable_too(open_gateway):
    answer = httpx.post(f"{open_gateway.url}/v1/chat/completions", content=b"{", headers={"origin": PAGE})
    assert answer.status_code == 400 and answer.headers["access-control-allow-origin"] == PAGE


def test_another_page_may_not(open_gateway, chat_body):
    foreign = {"origin": "https://evil.example"}
    asked = httpx.options(f"{open_gateway.url}/v1/chat/completions", headers=PREFLIGHT | foreign)
    assert asked.status_code == 400
    answer = httpx.post(f"{open_gateway.url}/v1/chat/completions", json=chat_body(), headers=foreign)
    assert "access-control-allow-origin" not in answer.headers


def test_without_the_setting_no_page_may(gateway, chat_body):
    asked = httpx.options(f"{gateway.url}/v1/chat/completions", headers=PREFLIGHT)
    answer = httpx.post(f"{gateway.url}/v1/chat/completions", json=chat_body(), headers={"origin": PAGE})
    assert asked.status_code == 405
    assert not any("access-control-allow-origin" in each.headers for each in (asked, answer))
