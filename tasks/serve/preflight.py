"""Say before anything starts or stops why the services could not run: model, ports, memory.

Ring: edge (looks at disk, /proc and nvidia-smi; changes nothing).  Units: bytes.
"""

from collections.abc import Iterable
from pathlib import Path

from tasks import machine, processes
from tasks.errors import CapacityError, MissingError, PortTakenError
from tasks.serve import ports as tcp
from tasks.serve.settings import SLOTS, ServiceSettings

_CPU_OVERHEAD_BYTES = 1_500_000_000  # vLLM's own code and buffers: 1.2-2.3 GB were measured with a tiny model


def check_model(settings: ServiceSettings) -> None:
    """Raise MissingError unless the model folder looks like one and vLLM's environment is there."""
    folder = settings.model_folder
    if folder is not None and not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "does not exist"
        raise MissingError(
            f"model folder {folder} {what}: set MODEL_DIR to a merged model's folder or to a Hub id such as owner/name"
        )
    if not settings.vllm_python.exists():
        raise MissingError(
            f"vLLM's environment is not at {settings.vllm_python.parent.parent}: "
            "make it with `python3 deployments/environments.py vllm`"
        )


def check_ports(settings: ServiceSettings, names: Iterable[str]) -> None:
    """Raise PortTakenError when a port that is needed belongs to a process that is not ours."""
    ports = {"vllm": settings.vllm_port, "gateway": settings.spec.gateway_port}
    variable = {"vllm": "VLLM_PORT", "gateway": "LITE_GATEWAY_PORT"}
    for name in names:
        port = ports[name]
        if tcp.is_port_free(settings.spec.host, port):
            continue
        holder = tcp.find_listener(port)
        if holder.pid and any(
            processes.is_member(holder.pid, settings.identity_file(other)) for other in (*SLOTS, "gateway")
        ):
            continue
        who = f"pid {holder.pid} ({holder.command})" if holder.pid else holder.command
        raise PortTakenError(
            f"port {port} for {name} is taken by {who}: end it, or choose another port with {variable[name]}"
        )


def check_memory(settings: ServiceSettings) -> None:
    """Raise CapacityError when the weights can't fit. Hub models are not estimated: their size is unknown here."""
    folder = settings.model_folder
    if folder is None:
        return
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    if has_cpu_build(settings.vllm_python):
        needed = _cpu_bytes(settings, weight_bytes)
        available = machine.available_memory_bytes() + processes.resident_bytes(settings.identity_file(settings.slot))
        way_out = "stop other programs, serve a smaller model, or serve on a GPU"
        kind = "memory"
    else:
        largest = max((gpu.total_bytes for gpu in machine.list_gpus()), default=0)
        available = int(largest * settings.spec.gpu_memory_utilization)
        needed = weight_bytes
        way_out = "raise gpu_memory_utilization, or pass --tensor-parallel-size in extra_args"
        kind = "GPU memory"
        if not available or "--tensor-parallel-size" in settings.spec.extra_args:
            return
    if needed > available:
        raise CapacityError(
            f"serving {folder} needs about {needed / 1e9:.1f} GB of {kind} "
            f"({weight_bytes / 1e9:.1f} GB of weights) but {available / 1e9:.1f} GB are available: {way_out}"
        )


def check_room_beside(settings: ServiceSettings) -> str:
    """Return, in numbers, that this vLLM fits beside what runs. Raises CapacityError when it does not.

    vLLM on a GPU takes `gpu_memory_utilization` of its memory whatever the model's size, and does not start when
    that much is not free.
    """
    folder = settings.model_folder
    weight_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors")) if folder else 0
    if has_cpu_build(settings.vllm_python):
        needed, available = _cpu_bytes(settings, weight_bytes), machine.available_memory_bytes()
        kind, way_out = "memory", "serve on a machine with more"
    else:
        gpus = machine.list_gpus()
        best = max(gpus, key=lambda gpu: gpu.free_bytes, default=None)
        if best is None:
            return "nvidia-smi lists no GPU: its memory is not looked at"
        needed, available = int(best.total_bytes * settings.spec.gpu_memory_utilization), best.free_bytes
        kind, way_out = "GPU memory", f"lower gpu_memory_utilization ({settings.spec.gpu_memory_utilization:g}) of both"
    numbers = f"about {needed / 1e9:.1f} GB of {kind} beside the old one, {available / 1e9:.1f} GB are free"
    if needed > available:
        raise CapacityError(f"the new vLLM needs {numbers}: {way_out}, or promote with strategy replace")
    return f"the new vLLM needs {numbers}"


def _cpu_bytes(settings: ServiceSettings, weight_bytes: int) -> int:
    widening = 2 if settings.spec.dtype == "float32" else 1  # the files hold bfloat16
    return weight_bytes * widening + settings.spec.cpu_kv_cache_bytes + _CPU_OVERHEAD_BYTES


def has_cpu_build(vllm_python: Path) -> bool:
    """Say whether the vLLM beside this interpreter is the CPU build; the flags differ."""
    return any((vllm_python.parent.parent / "lib").glob("python3*/site-packages/vllm-*cpu*.dist-info"))
