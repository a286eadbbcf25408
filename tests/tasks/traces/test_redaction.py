"""What is taken out, what is left alone, and laws that hold for any text."""

import contextlib
import json
import time
from ipaddress import ip_address

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tasks.errors import SpecError
from tasks.traces.numbers_in_text import is_card, is_my_number, is_phone, take_numbers
from tasks.traces.record import TraceRecord, from_line
from tasks.traces.redaction import _IP4, _IP6, KINDS, Redactor, _may_hold_ip, _may_hold_numbers, read_patterns
from tasks.traces.secrets_in_text import is_secret_name, may_hold_secrets, take_secrets

steady = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # two shared cores
ALL = Redactor(kinds=frozenset(KINDS))
KEYS = [
    "sk-proj-abcDEF0123456789xyz",
    "sk-ant-api03-abcDEF0123456789xyz",
    "hf_abcdefghijklmnopqrstuvwx",
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_abcdefghijklmnopqrstuvwxyz0123",
    "github_pat_11ABCDEFG0abcdefghij",
    "glpat-abcdefghij0123456789",
    "xoxb-1234567890-abcdef",
    "AIzaSyA-abcdefghijklmnopqrstuvwxyz01234",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\nabc==\n-----END RSA PRIVATE KEY-----",
]


def redact(redactor, record):
    return TraceRecord(**redactor.redact(record.to_dict()))


def clean(text, redactor=ALL):
    counts = {}
    return redactor.text(text, counts), counts


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("around", ["{}", "鍵は{}です", '"{}"', "key={}&x=1", "({})", "a\n{}\nb", "x-{}"])
def test_keys_of_known_shapes_are_taken_wherever_they_stand(key, around):
    text = around.format(key)
    assert may_hold_secrets(text) or "BEGIN" in key
    cleaned, counts = clean(text, Redactor())
    assert key not in cleaned
    assert cleaned == around.format("[redacted:secret]")
    assert counts == {"secrets": 1}


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("Authorization: Bearer abc123def456", "Authorization: Bearer [redacted:secret]"),
        ("AUTHORIZATION: Basic dXNlcjpwYXNz", "AUTHORIZATION: Basic [redacted:secret]"),
        ('x = {"db_password": "a b\\"c"}', 'x = {"db_password": "[redacted:secret]"}'),
        ("{'apiKey': 'a\"b'}", "{'apiKey': '[redacted:secret]'}"),
        ('"{\\"password\\": \\"hunter2\\", \\"u\\": 1}"', '"{\\"password\\": \\"[redacted:secret]\\", \\"u\\": 1}"'),
        ("API_KEY=abc123xyz python x.py", "API_KEY=[redacted:secret] python x.py"),
        ("redis://:hunter2@host:6379/0", "redis://:[redacted:secret]@host:6379/0"),
        ("パスワードは「hunter2!」です", "パスワードは「[redacted:secret]」です"),
        ("-----BEGIN PRIVATE KEY-----\nMIIEvQ and it ends", "[redacted:secret]"),
    ],
)  # fmt: skip
def test_credentials_are_found_by_what_stands_before_them(text, cleaned):
    assert clean(text, Redactor()) == (cleaned, {"secrets": 1})
    assert may_hold_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "the bearer responsible for this task-specific risk",
        "password: os.environ['X']",
        "token=next_token",
        '{"max_tokens": 5, "eos_token": "</s>"}',
        "a sk-short key, hf_x, std::vector<int>, 10:30:45",
        "version 1.2.3, id 1700000000, 2026-11-21 10:30",
        "https://example.org:8080/a@b",
        "order A0312345678, 4112 1111 1111 1111",
        "日本の祭りは7月から8月に行われます。",
    ],
)
def test_what_only_looks_like_it_is_left_alone(text):
    assert clean(text) == (text, {})


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("taro.yamada+x@mail.example.co.jp", "email"),
        ("03-1234-5678", "phone"),
        ("０９０－１２３４－５６７８", "phone"),
        ("0120-444-444", "phone"),
        ("(03) 1234 5678"[1:], "phone"),
        ("+81 (0)90-1234-5678", "phone"),
        ("+1 212 555 0123", "phone"),
        ("4111 1111 1111 1111", "card"),
        ("5555555555554444", "card"),
        ("378282246310005", "card"),
        ("1234-5678-9018", "my_number"),
        ("192.168.10.7", "ip"),
        ("2001:db8::8a2e:370:7334", "ip"),
    ],
)
def test_personal_data_is_taken_and_only_when_it_is_asked_for(text, kind):
    for around in ("{}", "私は{}です。", "<{}>", "call {}, please", "see {}."):
        assert clean(around.format(text)) == (around.format(f"[redacted:{kind}]"), {kind: 1})
    assert clean(f"私は{text}です", Redactor()) == (f"私は{text}です", {})


def test_a_number_beside_another_one_is_found():
    assert clean("card 4111 1111 1111 1111 123 and 2026-11-21 0312345678")[0] == (
        "card [redacted:card] 123 and 2026-11-21 [redacted:phone]"
    )


def test_check_digits():
    assert is_my_number("123456789018")
    assert sum(is_my_number(f"12345678901{last}") for last in range(10)) == 1
    assert sum(is_card(f"411111111111111{last}") for last in range(10)) == 1
    assert not is_phone("00312345678")
    assert not is_secret_name("total_tokens")


def test_a_record_keeps_its_shape_and_says_what_was_taken(make_record):
    arguments = json.dumps({"to": "a@b.co", "password": 'x"y', "n": 1})
    call = {"function": {"name": "f", "arguments": arguments}, "id": "1", "type": "function"}
    schema = {"type": "object", "properties": {"password": {"type": "string"}}, "required": ["password"]}
    request = {
        "messages": [{"role": "user", "content": [{"type": "text", "text": f"key {KEYS[0]}"}]}],
        "tools": [{"function": {"name": "f", "parameters": schema}}],
        "metadata": {"taro@example.com": True, "apiKey": 12345, "password": None},
    }
    choice = {
        "message": {"content": None, "tool_calls": [call]},
        "logprobs": {"content": [{"token": "sk", "logprob": -1.0}]},
    }
    record = make_record(1, request=request, response={"choices": [choice]}, error="for a@b.co")
    made = redact(Redactor(kinds=frozenset({"secrets", "email"})), record)
    assert made.request["messages"][0]["content"][0]["text"] == "key [redacted:secret]"
    assert made.request["tools"] == request["tools"]
    assert made.request["metadata"] == {"[redacted:email]": True, "apiKey": "[redacted:secret]", "password": None}
    call = made.response["choices"][0]["message"]["tool_calls"][0]
    assert json.loads(call["function"]["arguments"]) == {
        "to": "[redacted:email]",
        "password": "[redacted:secret]",
        "n": 1,
    }
    assert made.response["choices"][0]["logprobs"] is None  # it would spell the key out again
    assert made.error == "for [redacted:email]"
    assert made.redactions == {"secrets": 3, "email": 3, "tokenwise": 1}
    assert from_line(made.to_line()) == made


def test_a_record_without_secrets_is_the_same_object(make_record):
    answer = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "choices": [{"logprobs": {"content": [
        {"token": "x", "logprob": -1.0, "top_logprobs": [{"token": "y", "logprob": -2.0}]}]}}],
        "usage": {"total_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}}  # fmt: skip
    fields = make_record(1, response=answer).to_dict()
    assert Redactor().redact(fields) is fields
    fields = make_record(1, request={"password": "x"}).to_dict()
    assert Redactor(kinds=frozenset()).redact(fields) is fields


def test_what_nests_too_deep_leaves_only_metadata(make_record):
    deep = [f"a {KEYS[0]}"]
    for _ in range(300):
        deep = [deep]
    made = redact(Redactor(), make_record(1, request={"messages": deep}))
    assert (made.request, made.response, made.redactions) == (None, None, {"too_deep": 1})


def test_images_are_left_alone():
    url = "data:image/png;base64," + "0312345678" * 10
    assert ALL._walk({"url": url}, counts := {}, 0) == {"url": url}
    assert counts == {}


def test_ones_own_patterns_are_read_and_bad_ones_named():
    patterns = read_patterns("# staff numbers\n\nEMP-\\d{4}\n", "p.txt")
    assert clean("EMP-1234 says", Redactor(kinds=frozenset(), patterns=patterns)) == (
        "[redacted:custom] says",
        {"custom": 1},
    )
    for line, message in (("(", "p.txt:2 is no regular"), ("a*", "p.txt:2 matches the empty"), ("(a+)+b", "repeats a")):
        with pytest.raises(SpecError, match=message):
            read_patterns(f"x\n{line}", "p.txt")


pieces = st.sampled_from(
    [*KEYS, "taro@example.com", "03-1234-5678", "4111111111111111", "123456789018", "10.0.0.1", "::1", "a", "あ", " ",
     "0", "9", "-", ".", "@", ":", "=", '"', "'", "\\", "{", "}", "[", "]", "\n", "password", "Bearer ", "sk-", "eyJ",
     "://", "[redacted:email]", "[redacted:", "パスワードは", "token", "+81", "hunter2x", '"password":"', "１２３"]
)  # fmt: skip
texts = st.lists(pieces | st.text(max_size=4), max_size=14).map("".join)


@steady
@given(texts)
def test_redacting_twice_changes_nothing_and_growth_is_bounded(text):
    once, counts = clean(text)
    again, more = clean(once)
    assert (again, more) == (once, {})
    assert len(once) <= len(text) + 20 * sum(counts.values())
    if not counts:
        assert once is text or once == text


@steady
@given(texts)
def test_the_quick_look_misses_nothing(text):
    if take_secrets(text)[1]:
        assert may_hold_secrets(text)


@steady
@given(texts)
def test_the_quick_looks_for_numbers_and_addresses_miss_nothing(text):
    if take_numbers(text, frozenset(KINDS))[1]:
        assert _may_hold_numbers(text)
    for match in [*_IP4.finditer(text), *_IP6.finditer(text)]:
        with contextlib.suppress(ValueError):
            ip_address(match[0].rstrip("."))
            assert _may_hold_ip(text)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)


names = texts | st.sampled_from(["content", "token", "password", f"{KEYS[0]}password", "10.0.0.1", "a@b.co"])
bodies = st.recursive(
    st.booleans() | st.integers() | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@steady
@given(st.lists(bodies, min_size=1, max_size=2), st.sampled_from([KINDS, ("secrets",), ("ip",), ("card", "email")]))
def test_what_the_skim_lets_through_holds_nothing_whoever_was_skimmed_before(skimmed, kinds):
    redactor = Redactor(kinds=frozenset(kinds))
    for value in skimmed:  # the second one meets the names and short texts of the first
        counts = {}
        redactor._walk(value, counts, 0)
        assert redactor._may_match([[value]]) or not counts


def shape(value):
    if isinstance(value, dict):
        return [shape(item) for item in value.values()]
    return [shape(item) for item in value] if isinstance(value, list) else isinstance(value, str)


@steady
@given(values)
def test_the_structure_is_kept_at_any_depth(value):
    walked = ALL._walk(value, {}, 0)
    numbers = ALL._walk({"x": value}, {}, 0)["x"]
    assert numbers == walked
    if not isinstance(value, dict) or not any(is_secret_name(name) for name in value):
        assert len(json.dumps(shape(walked))) <= len(json.dumps(shape(value)))
    json.dumps(walked)


HOSTILE = [
    "a", "0", "0 ", "sk-", "eyJaaaaaa.", "eyJaaaaaaaa-", "-----BEGIN PRIVATE KEY-----", "-----BEGIN A A A A ", "://a:b",
    '"password":"', "\"a':", "password=aaaaaaa(", "a@", "a@b.", "1.1.1.", "1:", '\\\\"', "authorization: ", "+1-",
    "((((0", "bearer aaaaaaaa ", "パスワードは", "[redacted:", "password: ", "a=",
]  # fmt: skip


@pytest.mark.parametrize("piece", HOSTILE)
def test_no_text_is_slow(piece):
    """Twice the text takes about twice the time: the best of three ratios, and 4 ms for a kB at most."""
    ratios, longest = [], []
    for _ in range(3):
        spent = []
        for length in (20_000, 80_000):
            text = (piece * length)[:length]
            begin = time.process_time()
            ALL._string(text, {}, 0)
            spent.append(max(time.process_time() - begin, 1e-4))
        ratios.append(spent[1] / spent[0])
        longest.append(spent[1])
    assert min(longest) < 0.32
    assert min(ratios) < 8  # 4 when linear, 16 when quadratic
