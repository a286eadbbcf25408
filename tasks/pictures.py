"""Draw what was measured: losses, memory, which experts are used.

    plain records (dicts, as metrics.jsonl and experts.jsonl hold them) -> PNG bytes

Ring: pure (values in, PNG bytes out).  Units: bytes in, GB shown; nats per token.  Shapes: L layers, E experts.
"""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from tasks.errors import DataError

Record = dict[str, Any]  # Any: JSON values
_MEMORY = ("peak_gpu_bytes", "gpu_bytes", "peak_host_bytes", "host_bytes")
_PANELS = (  # key, title, logarithmic
    ("loss", "loss (nats per token)", False),
    ("perplexity", "perplexity", True),
    ("accuracy", "next-token accuracy", False),
    ("learning_rate", "learning rate", False),
)


def loss_curve(
    records: list[Record],
    title: str,
    marks: dict[str, float] | None = None,
    evaluations: list[Record] | None = None,
) -> bytes:
    """Return a PNG of loss by step.

    Args:
        records: metrics records with "step" and "loss".
        title: above the picture.
        marks: label -> value of horizontal lines (validation loss before and after).
        evaluations: records with "step" and "eval_loss", drawn as points.
    """
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    axes.plot([r["step"] for r in records], [r["loss"] for r in records], linewidth=1.5, label="training loss")
    if evaluations:
        axes.plot(
            [r["step"] for r in evaluations],
            [r["eval_loss"] for r in evaluations],
            "o--",
            color="C3",
            label="validation loss",
        )
    for index, (label, value) in enumerate((marks or {}).items()):
        axes.axhline(value, linestyle="--", linewidth=1, color=f"C{index + 1}", label=f"{label} {value:.3f}")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def training_panels(records: Sequence[Record], title: str, held_out: Sequence[Record] = ()) -> bytes:
    """Return a PNG of loss, perplexity, next-token accuracy and learning rate by step, one panel each.

    Args:
        records: with "step" and "loss" and, where it is known, "accuracy" (0..1) and "learning_rate".
        title: above the picture.
        held_out: with "step" and "eval_loss", drawn beside the loss.
    Raises: DataError when no record holds a loss.
    """
    known = [record for record in records if record.get("loss") is not None]
    if not known:
        raise DataError(f"no loss to draw for {title!r}: none of {len(records)} records holds step and loss")
    known = [{**record, "perplexity": math.exp(min(record["loss"], 80.0))} for record in known]  # inf can't be drawn
    figure = _figure(9, 6)
    figure.suptitle(title)
    for axes, (key, label, is_log) in zip(figure.subplots(2, 2).flat, _PANELS, strict=True):
        points = [(record["step"], record[key]) for record in known if record.get(key) is not None]
        axes.plot(*zip(*points, strict=True), linewidth=1.5) if points else axes.text(
            0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes
        )
        if is_log:
            axes.set_yscale("log")
        if key == "loss" and held_out:
            axes.plot([at["step"] for at in held_out], [at["eval_loss"] for at in held_out], "o-", label="held out")
            axes.legend()
        last = f", last {points[-1][1]:.4g}" if points else ""
        axes.set_title(f"{label}{last}", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
    return _png(figure)


def reward_curves(records: Sequence[Record], rewards: Sequence[str], title: str) -> bytes:
    """Return a PNG of a GRPO run by step: rewards, length, ratio and KL, how much of the adapter the rollouts show.

    Args:
        records: with "step", "reward" and, of each reward, "<name>_mean"; as metrics.jsonl holds them.
        rewards: their names.
        title: above the picture.
    Raises: DataError when no record holds a reward.
    """
    panels = (
        ("reward (sum and each)", ["reward", *(f"{name}_mean" for name in rewards)]),
        ("tokens of a completion", ["completion_tokens", "completion_tokens_max"]),
        ("rollout and policy: ratio, KL from the start", ["ratio_mean", "ratio_min", "ratio_max", "kl"]),
        ("share of the adapter's change in the rollouts", ["adapter_share"]),
    )
    return _reward_panels(records, panels, title)


def ppo_curves(records: Sequence[Record], title: str) -> bytes:
    """Return a PNG of a PPO run by step: reward and test score, length, how far policy and critic moved.

    Args:
        records: with "step", "reward" and "test_score" where they are known, and verl's own values under "verl".
        title: above the picture.
    Raises: DataError when no record holds a reward.
    """
    panels = (
        ("mean reward, mean test score", ["reward", "test_score"]),
        ("tokens of a response", ["response_length/mean", "response_length/max"]),
        ("policy: KL of an update, entropy", ["actor/ppo_kl", "actor/entropy"]),
        ("critic: loss of the values", ["critic/vf_loss"]),
    )
    return _reward_panels([{**record.get("verl", {}), **record} for record in records], panels, title)


def _reward_panels(records: Sequence[Record], panels: Sequence[tuple[str, Sequence[str]]], title: str) -> bytes:
    if not any(record.get("reward") is not None for record in records):
        raise DataError(f"no reward to draw for {title!r}: none of {len(records)} records holds step and reward")
    figure = _figure(9, 6)
    figure.suptitle(title)
    for axes, (label, keys) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for key in keys:
            points = [(record["step"], record[key]) for record in records if record.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), linewidth=1.5, label=key.removesuffix("_mean"))
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=7)
    return _png(figure)


def reward_histograms(found: Mapping[str, Mapping[str, Any]], title: str) -> bytes:  # Any: JSON values
    """Return a PNG with one histogram a reward.

    Args:
        found: name -> {"counts", "min", "max", "mean"}, as the manifest of a GRPO run holds them.
        title: above the picture.
    Raises: DataError when there is none.
    """
    known = {name: each for name, each in found.items() if each.get("count")}
    if not known:
        raise DataError(f"no reward to draw for {title!r}: no completion was scored")
    figure = _figure(3.2 * len(known), 3.2)
    figure.suptitle(title)
    for axes, (name, each) in zip(figure.subplots(1, len(known), squeeze=False).flat, known.items(), strict=True):
        counts, low, high = each["counts"], each["min"], each["max"]
        width = (high - low) / len(counts) or 1.0
        axes.bar([low + width * (place + 0.5) for place in range(len(counts))], counts, width=width)
        axes.set_title(f"{name}, mean {each['mean']:.3g}", fontsize=10)
        axes.set_ylabel("completions")
    return _png(figure)


def memory_curve(records: Sequence[Record], title: str, *, total_bytes: int = 0, estimate_bytes: int = 0) -> bytes:
    """Return a PNG of memory by optimizer step, or by time where the records hold no steps.

    Args:
        records: with "step" or "time_s", and "peak_gpu_bytes", "gpu_bytes", "peak_host_bytes" or "host_bytes".
        title: above the picture.
        total_bytes: of the card, drawn as a line; 0: none.
        estimate_bytes: what was reckoned before the run, drawn as a line; 0: none.
    Raises: DataError when no record holds memory.
    """
    key = next((key for key in _MEMORY if any(record.get(key) for record in records)), "")
    if not key:
        raise DataError(f"no memory to draw for {title!r}: none of {len(records)} records holds {', '.join(_MEMORY)}")
    known = [record for record in records if record.get(key)]
    across = "step" if all("step" in record for record in known) else "time_s"
    values = [record[key] / 1e9 for record in known]
    figure = _figure(7, 4)
    axes = figure.add_subplot()
    where, kind = ("GPU" if "gpu" in key else "host"), ("peak so far" if "peak" in key else "in use")
    axes.plot([record[across] for record in known], values, linewidth=1.5, label=f"{where} memory, {kind}")
    lines = (("the card has", total_bytes, "C3"), ("estimated before", estimate_bytes, "C2"))
    for label, size, color in lines:
        if size:
            axes.axhline(size / 1e9, linestyle="--", linewidth=1, color=color, label=f"{label} {size / 1e9:.1f} GB")
    name = "optimizer step" if across == "step" else "seconds"
    axes.set(xlabel=name, ylabel="GB", title=f"{title}: at most {max(values):.2f} GB", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return _png(figure)


def expert_usage(records: Sequence[Record], title: str) -> bytes:
    """Return a PNG of how tokens are shared out over the experts of each layer.

    Left a heat map (L, E) of the last record, right over the steps the largest and smallest share of each layer, and
    the entropy of its shares: 1 when all experts are used alike, 0 when one does it all.

    Args:
        records: {"step": s, "usage": (L, E) shares of the tokens' choices; a layer's sum does not matter}.
        title: above the picture.
    Raises: DataError when there is no record, or one is not (L, E) of the others.
    """
    known = [record for record in records if record.get("usage")]
    if not known:
        raise DataError(f"no expert usage to draw for {title!r}: none of {len(records)} records holds usage")
    sizes = {tuple(map(len, record["usage"])) for record in known}
    if len(sizes) > 1 or len({*sizes.copy().pop()}) != 1:
        raise DataError(f"expert usage of {title!r} is of several shapes ({sorted(sizes)}): expected layers x experts")
    shares = [[_shares(layer) for layer in record["usage"]] for record in known]
    steps, num_layers, num_experts = [record["step"] for record in known], len(shares[0]), len(shares[0][0])
    figure = _figure(11, 5)
    figure.suptitle(title)
    grid = figure.add_gridspec(2, 2, width_ratios=(3, 2))
    heat = figure.add_subplot(grid[:, 0])
    image = heat.imshow(shares[-1], aspect="auto", cmap="viridis", vmin=0)
    figure.colorbar(image, ax=heat, label=f"share of tokens (even: {1 / num_experts:.3f})")
    heat.set(xlabel="expert", ylabel="layer", title=f"step {steps[-1]}", yticks=range(num_layers))
    extremes, entropy = figure.add_subplot(grid[0, 1]), figure.add_subplot(grid[1, 1])
    for layer in range(num_layers):
        of_layer = [step[layer] for step in shares]
        extremes.plot(steps, [max(shared) for shared in of_layer], color=f"C{layer}", label=f"layer {layer}")
        extremes.plot(steps, [min(shared) for shared in of_layer], "--", color=f"C{layer}")
        entropy.plot(steps, [normalised_entropy(shared) for shared in of_layer], color=f"C{layer}")
    extremes.axhline(1 / num_experts, color="grey", linewidth=0.8)
    extremes.set(title="largest (solid) and smallest (dashed) share", ylim=(0, None))
    entropy.set(title="normalised entropy of the shares", xlabel="optimizer step", ylim=(0, 1.05))
    for axes in (extremes, entropy):
        axes.grid(alpha=0.3)
    if num_layers <= 12:
        extremes.legend(fontsize=7, ncols=2)
    return _png(figure)


def normalised_entropy(shares: Sequence[float]) -> float:
    """Return the entropy of shares that add up to 1, over that of even ones.

    >>> normalised_entropy([0.25] * 4), normalised_entropy([1.0, 0.0])
    (1.0, 0.0)
    """
    if len(shares) < 2:
        return 1.0
    return abs(sum(share * math.log(share) for share in shares if share > 0) / math.log(len(shares)))


def _shares(counts: Sequence[float]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts] if total else [0.0] * len(counts)


def _figure(width: float, height: float) -> Any:  # Any: matplotlib's stubs leave its axes untyped
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    return Figure(figsize=(width, height), dpi=110, layout="constrained")


def _png(figure: Any) -> bytes:  # Any: as above
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
