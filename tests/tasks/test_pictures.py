"""Pictures are decoded and looked at: sizes, and that what is drawn follows from the records."""

import io
import struct
from collections.abc import Callable
from typing import Any

import pytest
from matplotlib.image import imread

from tasks import pictures
from tasks.errors import DataError

pytestmark = pytest.mark.long

STEPS = [
    {"step": step, "loss": 10 / step, "accuracy": step / 10, "learning_rate": 1e-3, "peak_gpu_bytes": 10**9 * step}
    for step in range(1, 6)
]
EVEN = [{"step": step, "usage": [[0.25] * 4, [0.25] * 4]} for step in (1, 2)]
SKEWED = [*EVEN[:1], {"step": 2, "usage": [[0.25] * 4, [1.0, 0.0, 0.0, 0.0]]}]


def size_of(png: bytes) -> tuple[int, int]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", png[16:24])


def colours_of(png: bytes) -> set[tuple[int, ...]]:
    """Return the colours as matplotlib's hexadecimal names have them, 0 to 255."""
    image = imread(io.BytesIO(png))
    return {tuple(pixel) for pixel in (image.reshape(-1, image.shape[-1])[:, :3] * 255).round().astype(int).tolist()}


@pytest.mark.parametrize(
    ("draw", "size"),
    [
        (lambda: pictures.loss_curve(STEPS, "t"), (770, 440)),
        (lambda: pictures.training_panels(STEPS, "t"), (990, 660)),
        (lambda: pictures.memory_curve(STEPS, "t", total_bytes=16 << 30, estimate_bytes=12 << 30), (770, 440)),
        (lambda: pictures.expert_usage(SKEWED, "t"), (1210, 550)),
    ],
)
def test_pictures_have_their_size_and_hold_something(draw: Callable[[], bytes], size: tuple[int, int]):
    png = draw()
    assert size_of(png) == size
    assert len(colours_of(png)) > 20
    assert draw() == png  # the same records, the same bytes


def has_hue(png: bytes, strong: int) -> bool:
    """Say whether one of red (0) and green (1) stands out somewhere: a line's edges are blended with white."""
    return any(colour[strong] - max(colour[:strong] + colour[strong + 1 :]) > 60 for colour in colours_of(png))


def test_lines_of_card_and_estimate_are_drawn_only_when_they_are_given():
    plain = pictures.memory_curve(STEPS, "t")
    assert [has_hue(plain, 0), has_hue(plain, 1)] == [False, False]
    card = pictures.memory_curve(STEPS, "t", total_bytes=16 << 30)
    assert [has_hue(card, 0), has_hue(card, 1)] == [True, False]
    both = pictures.memory_curve(STEPS, "t", total_bytes=16 << 30, estimate_bytes=8 << 30)
    assert [has_hue(both, 0), has_hue(both, 1)] == [True, True]


@pytest.mark.parametrize("key", ["peak_gpu_bytes", "gpu_bytes", "peak_host_bytes", "host_bytes"])
def test_memory_is_drawn_by_step_or_by_time(key: str):
    by_step = [{"step": i, key: i * 10**9} for i in (1, 2)]
    by_time = [{"time_s": i, key: i * 10**9} for i in (1, 2)]
    assert pictures.memory_curve(by_step, "t") != pictures.memory_curve(by_time, "t")


def test_a_skewed_layer_looks_other_than_an_even_one():
    even, skewed = (colours_of(pictures.expert_usage(records, "t")) for records in (EVEN, SKEWED))
    purple = (68, 1, 84)  # of a share of 0
    assert purple in skewed
    assert len(skewed - even) > 3


def test_panels_without_accuracy_say_so():
    plain = [{"step": r["step"], "loss": r["loss"]} for r in STEPS]
    assert pictures.training_panels(plain, "t") != pictures.training_panels(STEPS, "t")


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: pictures.training_panels([], "run 1"), "no loss to draw for 'run 1': none of 0 records"),
        (lambda: pictures.training_panels([{"step": 1}], "run 1"), "none of 1 records holds step and loss"),
        (lambda: pictures.memory_curve([{"step": 1, "loss": 2}], "m"), "no memory to draw for 'm': none of 1 records"),
        (lambda: pictures.expert_usage([], "e"), "no expert usage to draw for 'e': none of 0 records"),
        (lambda: pictures.expert_usage([{"step": 1, "usage": [[1.0], [0.5, 0.5]]}], "e"), "several shapes"),
        (lambda: pictures.expert_usage([EVEN[0], {"step": 2, "usage": [[1.0]]}], "e"), "several shapes"),
    ],
)
def test_nothing_to_draw_is_said(draw: Callable[[], Any], message: str):
    with pytest.raises(DataError, match=message):
        draw()
