"""Turn a ServeSpec into the argv and the environment of vLLM and of the gateway.

    ServeSpec + model -> vllm_command()    -> argv, extra variables
    ServeSpec + URL   -> gateway_command() -> argv, extra variables

Ring: pure.  Units: bytes.
Trap: on a CPU vLLM reserves 92 % of the memory unless it is told a KV cache size, and binds to
      0.0.0.0 unless it is told a host.
"""

from collections.abc import Mapping

from tasks.specs import ServeSpec

DEFAULT_MODEL = "a1273352/gpt-oss-20b-japanese-culture"
GATEWAY_VARIABLES = ("FILE_QUEUE_PATH", "LITE_PROMPT_MAX_LEN", "FALLBACK_ON_VLLM_DOWN", "GATEWAY_SHUTDOWN_S")


def vllm_command(
    spec: ServeSpec, model: str, *, on_gpu: bool, python: str, scratch: str, cache: str
) -> tuple[list[str], dict[str, str]]:
    """Return vLLM's argv and the variables it needs beside the caller's.

    Args:
        spec: the knobs; `extra_args` come last, so they win.
        model: local folder or Hub id. A folder is named by an absolute path, then nothing is downloaded.
        on_gpu: False adds what the CPU build needs.
        python: interpreter of vLLM's own environment.
        scratch: folder for vLLM's sockets and temporary files; keep it under 60 characters, a Unix socket's path
            may have 107.
        cache: folder for what vLLM compiles and looks up about kinds of models; several may share it.

    >>> argv, extra = vllm_command(ServeSpec(), "/m", on_gpu=False, python="py", scratch="/s", cache="/c")
    >>> argv[:7]
    ['py', '-P', '-m', 'vllm.entrypoints.cli.main', 'serve', '/m', '--host']
    >>> extra["HF_HUB_OFFLINE"], "--enforce-eager" in argv
    ('1', True)
    """
    argv = [python, "-P", "-m", "vllm.entrypoints.cli.main", "serve", model]
    argv += ["--host", spec.host, "--port", str(spec.vllm_port), "--served-model-name", spec.served_model_name]
    argv += ["--max-model-len", str(spec.max_model_len), "--max-num-seqs", str(spec.max_num_seqs)]
    argv += ["--dtype", spec.dtype, "--shutdown-timeout", "15"]  # let running answers end; stop waits 20 s
    variables = {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "TMPDIR": f"{scratch}/temporary",
        "VLLM_RPC_BASE_PATH": f"{scratch}/temporary",
        "VLLM_CACHE_ROOT": cache,
    }
    if model.startswith("/"):
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if on_gpu:
        argv += ["--gpu-memory-utilization", str(spec.gpu_memory_utilization)]
    else:
        argv += ["--kv-cache-memory-bytes", str(spec.cpu_kv_cache_bytes)]
        argv += ["--enforce-eager", "--distributed-executor-backend", "uni"]
        variables |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
        variables["TORCH_COMPILE_DISABLE"] = "1"  # else the first logprobs request compiles for 20 s
    return [*argv, *spec.extra_args], variables


def gateway_command(
    spec: ServeSpec, *, python: str, vllm_url: str, variables: Mapping[str, str]
) -> tuple[list[str], dict[str, str]]:
    """Return the gateway's argv and the seed's variables for it.

    Args:
        spec: host and port.
        python: interpreter of the main environment.
        vllm_url: full URL of vLLM's chat route.
        variables: the caller's environment; of it only GATEWAY_VARIABLES are handed on here.

    >>> argv, extra = gateway_command(ServeSpec(), python="py", vllm_url="http://h/v1", variables={"HOME": "/"})
    >>> argv, extra["LITE_GATEWAY_PORT"], "HOME" in extra
    (['py', '-m', 'deployments.gateway'], '8001', False)
    """
    extra = {"VLLM_URL": vllm_url, "LITE_GATEWAY_PORT": str(spec.gateway_port), "LITE_GATEWAY_HOST": spec.host}
    extra["GATEWAY_SHUTDOWN_S"] = "15"  # let running answers end; stop waits 20 s
    extra |= {name: variables[name] for name in GATEWAY_VARIABLES if name in variables}
    return [python, "-m", "deployments.gateway"], extra


def reach(host: str) -> str:
    """Return the address by which a service bound to `host` is reached from this machine.

    >>> reach("0.0.0.0"), reach("10.1.2.3"), reach("::")
    ('127.0.0.1', '10.1.2.3', '[::1]')
    """
    if host in {"0.0.0.0", "", "localhost"}:  # noqa: S104 - recognised, not bound
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host else host


def chat_url(spec: ServeSpec) -> str:
    """Return the URL of vLLM's chat route, the seed's VLLM_URL.

    >>> chat_url(ServeSpec())
    'http://127.0.0.1:8000/v1/chat/completions'
    """
    return f"http://{reach(spec.host)}:{spec.vllm_port}/v1/chat/completions"
