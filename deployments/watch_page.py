"""The page of `tatara watch`: curves as SVG and the last completions, in one HTML text without scripts from elsewhere.

Ring: pure.
"""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _PAD = 420, 150, 34
_COLORS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
_STYLE = (
    "body{font:14px system-ui,sans-serif;margin:1.5em;color:#1f2937}svg{background:#f9fafb;margin:0 1em 1em 0}"
    "table{border-collapse:collapse}td,th{border:1px solid #d1d5db;padding:.25em .5em;text-align:left;"
    "vertical-align:top;max-width:28em;overflow-wrap:anywhere}text{font-size:11px}"
)
Record = Mapping[str, Any]  # Any: JSON values


def page(
    name: str,
    records: Sequence[Record],
    generations: Sequence[Mapping[str, str]],
    rewards: Sequence[str],
    *,
    is_done: bool,
) -> str:
    """Return the page. It loads itself again every five seconds until the run is done.

    >>> text = page("adapter/<1>", [{"step": 1, "loss": 2.0}], [], [], is_done=False)
    >>> "adapter/&lt;1&gt;" in text, "<script" in text, 'http-equiv="refresh"' in text
    (True, False, True)
    """
    panels = [
        ("reward", ["reward", *(f"{name}_mean" for name in rewards)]),
        ("loss", ["loss"]),
        ("tokens of a completion", ["completion_tokens", "completion_tokens_max"]),
        ("ratio of policy to rollout", ["ratio_mean", "ratio_min", "ratio_max"]),
        ("share of the adapter in the rollouts", ["adapter_share"]),
        ("KL from the start", ["kl"]),
        ("learning rate", ["learning_rate"]),
        ("tokens/s", ["rollout_tokens_per_s", "learnt_tokens_per_s", "tokens_per_s"]),
    ]
    drawn = [curve(title, records, keys) for title, keys in panels]
    last = records[-1] if records else {}
    state = "done" if is_done else "running"
    refresh = "" if is_done else '<meta http-equiv="refresh" content="5">'
    return (
        f'<!doctype html><html><head><meta charset="utf-8">{refresh}<title>{escape(name)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(name)}</h1>"
        f"<p>{state}, step {last.get('step', 0)} of {last.get('num_steps', '?')}</p>"
        f"{''.join(filter(None, drawn))}{_table(generations)}</body></html>\n"
    )


def curve(title: str, records: Sequence[Record], keys: Sequence[str]) -> str:
    """Return an SVG of some values by step; "" when none is known.

    >>> curve("loss", [{"step": 1, "loss": None}], ["loss"])
    ''
    """
    known = {key: [(r["step"], float(r[key])) for r in records if r.get(key) is not None] for key in keys}
    known = {key: points for key, points in known.items() if points}
    if not known:
        return ""
    xs = [x for points in known.values() for x, _ in points]
    ys = [y for points in known.values() for _, y in points]
    low, high = min(ys), max(ys)
    scale_x = (_WIDTH - 2 * _PAD) / max(1, max(xs) - min(xs))
    scale_y = (_HEIGHT - 2 * _PAD) / (high - low or 1.0)
    parts = [f'<text x="{_PAD}" y="14" font-weight="bold">{escape(title)}</text>']
    for number, (key, points) in enumerate(known.items()):
        color = _COLORS[number % len(_COLORS)]
        place = " ".join(
            f"{_PAD + (x - min(xs)) * scale_x:.1f},{_HEIGHT - _PAD - (y - low) * scale_y:.1f}" for x, y in points
        )
        label = f"{key.removesuffix('_mean')} {points[-1][1]:.4g}"
        parts.append(f'<polyline points="{place}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        parts.append(f'<text x="{_PAD + 110 * number}" y="{_HEIGHT - 4}" fill="{color}">{escape(label)}</text>')
    parts.append(f'<text x="2" y="{_HEIGHT - _PAD}">{low:.3g}</text><text x="2" y="{_PAD + 4}">{high:.3g}</text>')
    return f'<svg width="{_WIDTH}" height="{_HEIGHT}">{"".join(parts)}</svg>'


def _table(rows: Sequence[Mapping[str, str]]) -> str:
    if not rows:
        return ""
    shown = [name for name in rows[0] if name not in ("whole", "prompt")]
    head = "".join(f"<th>{escape(name)}</th>" for name in shown)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(row[name][:400])}</td>" for name in shown) + "</tr>" for row in reversed(rows)
    )
    return f"<h2>last completions</h2><table><tr>{head}</tr>{body}</table>"
