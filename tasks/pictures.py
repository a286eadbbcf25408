"""Draw the loss of a run.

Ring: pure (values in, PNG bytes out).
"""

import io
from typing import Any


def loss_curve(
    records: list[dict[str, Any]],
    title: str,
    marks: dict[str, float] | None = None,
    evaluations: list[dict[str, Any]] | None = None,
) -> bytes:
    """Return a PNG of loss by step.

    Args:
        records: metrics records with "step" and "loss".
        title: above the picture.
        marks: label -> value of horizontal lines (validation loss before and after).
        evaluations: records with "step" and "eval_loss", drawn as points.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
