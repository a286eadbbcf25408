"""The gateway's settings: environment variables, read once and validated at start.

    os.environ -> Settings.from_environment() -> create_app(settings)

Names and defaults that the first Lite Gateway had keep them; what is new is called GATEWAY_*.

Ring: pure (the environment comes in as an argument).  Units: `_s` seconds, `_ms` milliseconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from deployments.gateway.variables import flag, number, one_of, read, setting, table, whole
from tasks.errors import SpecError

MAINTENANCE_MESSAGE = (
    "ただいまメンテナンス中のため、モデルは応答できません。しばらくしてからもう一度お試しください。"
    " (The model is under maintenance; this fixed message is not an answer of the model.)"
)
_LOG_LEVELS = ("critical", "error", "warning", "info", "debug")


def _text(text: str) -> str:
    return text


def _fsync(text: str) -> int:
    if text.lower() == "always":
        return -1
    if not text.isdecimal() or int(text) > 3_600_000:
        raise ValueError("expected milliseconds 0..3600000, or always")
    return int(text)


def _id(text: str) -> str:
    if not text.isascii() or not text.isprintable() or len(text) > 200:
        raise ValueError("expected at most 200 printable ASCII characters: it becomes a header")
    return text


def base_url(text: str) -> str:
    """Return scheme, host and prefix of an OpenAI-compatible server, without `/v1/...`.

    >>> base_url("http://localhost:8000/v1/chat/completions"), base_url("https://example.org/llm/")
    ('http://localhost:8000', 'https://example.org/llm')
    """
    parts = urlsplit(text)
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if parts.username or parts.password:
        raise ValueError("expected an URL without user and password: put the key into its own variable")
    if not valid or parts.query or parts.fragment:
        raise ValueError("expected an URL like http://localhost:8000/v1/chat/completions")
    path = f"{parts.path.rstrip('/')}/".partition("/v1/")[0].rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


@dataclass(frozen=True, slots=True)
class Weighted:
    """One server of several: `http://a:8000=95` gets 95 parts of the requests."""

    url: str
    weight: float = 1.0

    def __str__(self) -> str:
        return self.url if self.weight == 1.0 else f"{self.url}={self.weight:g}"


def servers(text: str) -> tuple[Weighted, ...]:
    """Read one URL or several with weights.

    >>> [str(server) for server in servers("http://a:8000=95, http://b:8000/v1=5")]
    ['http://a:8000=95', 'http://b:8000=5']
    """
    found = []
    for part in text.split(","):
        url, given, weight = part.strip().partition("=")
        try:
            parts = float(weight) if given else 1.0
        except ValueError:
            parts = 0.0
        if not 0 < parts <= 1e6:
            raise ValueError("expected URLs with a weight above 0 each, like http://a:8000=95,http://b:8000=5")
        found.append(Weighted(base_url(url), parts))
    return tuple(found)


def _lite(text: str) -> str:
    """Take a URL; a folder or Hub id as it is: whether it is there is looked at when it is started."""
    return base_url(text) if "://" in text else text


def origins(text: str) -> tuple[str, ...]:
    """Read the origins of web pages, or `*`.

    >>> origins("https://app.example.com, http://localhost:3000")
    ('https://app.example.com', 'http://localhost:3000')
    """
    found = tuple(part.strip() for part in text.split(","))
    for origin in found:
        parts = urlsplit(origin)
        if origin != "*" and (parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}"):
            raise ValueError("expected * or origins like https://app.example.com,http://localhost:3000, without a path")
    return found


def is_loopback(host: str) -> bool:
    """Say whether only this machine reaches what listens there.

    >>> is_loopback("127.0.0.2"), is_loopback("::1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, True, False)
    """
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _redis_url(text: str) -> str:
    if urlsplit(text).scheme not in ("redis", "rediss", "unix"):
        raise ValueError("expected a redis://, rediss:// or unix:// URL")
    return text


_PORT, _COUNT = whole(1, 65535), whole(0, 1_000_000)
_seconds = number(lambda value: 0 < value <= 86400, "seconds, more than 0 and at most 86400")


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All that can be set. A secret never shows in `repr`."""

    vllm_url: tuple[Weighted, ...] = setting(
        "VLLM_URL",
        (Weighted("http://localhost:8000"),),
        servers,
        "vLLM; the seed's form http://localhost:8000/v1/chat/completions is the same; several as `http://a=95,http://b=5`",
    )
    upstreams_file: Path | None = setting(  # noqa: RUF009 - it is dataclasses.field
        "GATEWAY_UPSTREAMS_FILE", None, Path, "list of vLLM servers in VLLM_URL's stead, followed while it runs"
    )
    vllm_api_key: str = setting(
        "VLLM_API_KEY", "", _text, "sent to vLLM as Bearer; unset: the client's own header", secret=True
    )
    host: str = setting("LITE_GATEWAY_HOST", "127.0.0.1", _text, "address to listen on")
    port: int = setting("LITE_GATEWAY_PORT", 8001, _PORT, "port to listen on")
    published_host: str = setting(
        "GATEWAY_PUBLISHED_HOST", "", _text, "address that a container's port is published on; unset: as it listens"
    )
    keys_file: Path | None = setting(  # noqa: RUF009 - it is dataclasses.field
        "GATEWAY_KEYS_FILE", None, Path, "who may ask; see API keys"
    )
    allow_unauthenticated: bool = setting(
        "GATEWAY_ALLOW_UNAUTHENTICATED", False, flag, "serve others than this machine without keys"
    )
    allowed_origins: tuple[str, ...] = setting(
        "GATEWAY_ALLOWED_ORIGINS",
        (),
        origins,
        "web pages whose scripts may ask (CORS): https://app.example.com,...; *: any page that a user opens",
    )
    lite_max_chars: int = setting("LITE_PROMPT_MAX_LEN", 120, _COUNT, "longest prompt for lite, characters")
    lite_model: str = setting(
        "LITE_MODEL",
        "",
        _lite,
        "for short prompts: a folder or Hub id (owner/name, owner/name@revision), loaded in a process of the gateway's "
        "own, or the URL of a second OpenAI-compatible server",
    )
    lite_model_name: str = setting(
        "LITE_MODEL_NAME", "", _text, "model to ask there; unset: the server's first, or the folder's name"
    )
    lite_processes: int = setting("LITE_PROCESSES", 1, whole(1, 64), "processes that load it; each holds a copy")
    lite_waiting: int = setting(
        "LITE_MAX_WAITING", 4, _COUNT, "requests that wait for each of them; beyond it vLLM is asked"
    )
    lite_api_key: str = setting("LITE_API_KEY", "", _text, "sent to the lite server as Bearer", secret=True)
    lite_canned: bool = setting(
        "LITE_CANNED", False, flag, "short prompts get the maintenance message even while vLLM is up"
    )
    fallback: bool = setting("FALLBACK_ON_VLLM_DOWN", True, flag, "vLLM down: lite or the maintenance message, not 503")
    queue_path: Path = setting(  # noqa: RUF009 - it is dataclasses.field
        "FILE_QUEUE_PATH", Path("./llm_traces.jsonl"), Path, "traces; with Redis, the spool before it"
    )
    redis_url: str = setting("REDIS_URL", "", _redis_url, "ship traces to the stream llm_traces here", secret=True)
    max_body_bytes: int = setting(
        "GATEWAY_MAX_BODY_BYTES", 10 << 20, whole(1, 1 << 30), "largest request body; beyond it 413"
    )
    max_header_bytes: int = setting(
        "GATEWAY_MAX_HEADER_BYTES", 64 << 10, whole(1024, 1 << 20), "largest request head; beyond it 431"
    )
    max_concurrent: int = setting(
        "GATEWAY_MAX_CONCURRENT", 256, whole(1, 1_000_000), "requests at the model servers at once"
    )
    max_waiting: int = setting("GATEWAY_MAX_WAITING", 256, _COUNT, "requests that wait for their turn; beyond it 503")
    wait_s: float = setting("GATEWAY_WAIT_S", 10.0, _seconds, "longest wait for a turn; then 503")
    total_timeout_s: float = setting("GATEWAY_TOTAL_TIMEOUT_S", 3600.0, _seconds, "for one request in all")
    stream_usage: bool = setting(
        "GATEWAY_STREAM_USAGE", True, flag, "ask for the token counts of every stream, for the trace"
    )
    connect_timeout_s: float = setting("GATEWAY_CONNECT_TIMEOUT_S", 2.0, _seconds, "to connect to vLLM")
    read_timeout_s: float = setting("GATEWAY_READ_TIMEOUT_S", 600.0, _seconds, "between two bytes from vLLM")
    body_timeout_s: float = setting("GATEWAY_BODY_TIMEOUT_S", 30.0, _seconds, "for a client to send its body")
    probe_interval_s: float = setting("GATEWAY_PROBE_INTERVAL_S", 1.0, _seconds, "between probes of a dead vLLM")
    fsync_ms: int = setting(
        "GATEWAY_TRACE_FSYNC_MS",
        1000,
        _fsync,
        "a power cut costs at most so much; 0: the kernel decides; always: nothing",
    )
    segment_bytes: int = setting(
        "GATEWAY_TRACE_SEGMENT_BYTES", 16 << 20, whole(4096, 1 << 32), "size at which the trace file is sealed"
    )
    drain_delay_s: int = setting(
        "GATEWAY_DRAIN_DELAY_S", 0, whole(0, 3600), "on SIGTERM: /ready says 503 so long before it stops listening"
    )
    shutdown_s: int = setting("GATEWAY_SHUTDOWN_S", 30, whole(1, 3600), "for running answers to end on SIGTERM")
    maintenance_message: str = setting(
        "GATEWAY_MAINTENANCE_MESSAGE", MAINTENANCE_MESSAGE, _text, "what is said when no model can answer"
    )
    model_digest: str = setting("TATARA_MODEL_DIGEST", "", _id, "of the served model, in headers and traces")
    adapter_digest: str = setting("TATARA_ADAPTER_DIGEST", "", _id, "of the adapter merged into it")
    run_id: str = setting("TATARA_RUN_ID", "", _id, "of the flow run that serves it")
    log_level: str = setting("GATEWAY_LOG_LEVEL", "info", one_of(*_LOG_LEVELS), ", ".join(_LOG_LEVELS))

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> Self:
        """Read every variable that is set and not empty; all faults in one SpecError."""
        return read(cls, environ)

    @property
    def runs_lite(self) -> bool:
        """Whether the lite model runs in processes of the gateway's own."""
        return bool(self.lite_model) and "://" not in self.lite_model

    def check_exposure(self) -> None:
        """Raise SpecError when others than this machine could ask without a key."""
        host = self.published_host or self.host
        if self.keys_file is None and not self.allow_unauthenticated and not is_loopback(host):
            raise SpecError(
                f"LITE_GATEWAY_HOST={host!r} can be reached from outside and GATEWAY_KEYS_FILE is not set: "
                "create a key (python -m deployments.gateway.keys add NAME), or set GATEWAY_ALLOW_UNAUTHENTICATED=true"
            )


def settings_table() -> str:
    """Return the settings as a Markdown table, for the documentation.

    >>> settings_table().splitlines()[0]
    '| variable | default | meaning |'
    """
    return table(Settings, {MAINTENANCE_MESSAGE: "(a message)"})
