"""A hang is told from a slow step."""

import pytest

from tasks.liveness import HangError, Liveness


def watch(**more: float) -> Liveness:
    return Liveness(**{"stall_timeout_s": 100.0, "heartbeat_timeout_s": 20.0, "now": 0.0, **more})


def beat(step: int, count: int, time: float) -> dict[str, object]:
    return {"phase": "train", "step": step, "count": count, "time": time}


def test_a_slow_step_is_said_once_and_not_ended():
    liveness = watch(stall_timeout_s=10_000.0)
    said: list[str] = []
    for second in range(2000):
        step = min(second // 2, 10)  # two seconds a step, and then one that lasts
        liveness.see_beat(beat(step, step, second), second)
        said.append(liveness.judge(second))
    (line,) = filter(None, said)
    assert line == "step 10 is slow (train, 31 s without progress, 2.0 s are usual), but it lives"


def test_a_heartbeat_that_goes_on_over_a_main_thread_that_does_not_is_a_hang():
    liveness = watch()
    for second in range(101):
        liveness.see_beat(beat(3, 7, second), second)
        liveness.judge(second)
    liveness.see_beat(beat(3, 7, 101), 101)
    with pytest.raises(
        HangError, match="no progress for 101 s: its heartbeat goes on, but in phase train of step 3 nothing"
    ):
        liveness.judge(101)


def test_progress_inside_a_step_is_progress():
    liveness = watch()
    for second in range(0, 1000, 10):
        liveness.see_beat(beat(3, second, second), second)
        assert "hang" not in liveness.judge(second)


def test_a_process_that_stands_still_is_found_long_before_the_stall():
    liveness = watch()
    for second in range(21):
        liveness.see_beat(beat(3, 7, 0.0), second)
        liveness.judge(second)
    with pytest.raises(HangError, match=r"its heartbeat stands still for 21 s \(phase train, step 3\)"):
        liveness.judge(21)


def test_a_clock_that_jumps_is_no_hang():
    liveness = watch()
    for second in range(50):
        liveness.see_beat(beat(second, second, 1e9 if second % 2 else -1e9), second)
        assert liveness.judge(second) == ""


def test_without_a_heartbeat_only_output_counts():
    liveness = watch()
    liveness.see_beat({}, 50)
    assert liveness.judge(99) == ""
    liveness.see_progress(99)
    assert liveness.judge(198) == ""
    with pytest.raises(HangError, match="no progress for 101 s: it hangs"):
        liveness.judge(200)
