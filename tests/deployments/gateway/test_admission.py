import asyncio
import random
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deployments.gateway.admission import BusyError, Gate
from deployments.gateway.budgets import Budgets
from deployments.gateway.settings import Settings, Weighted
from deployments.gateway.upstream import Upstream, order_by_load


def test_whoever_waits_is_served_in_turn_by_key():
    async def run():
        gate, served = Gate(1, 10, 5.0), []
        assert gate.try_enter()

        async def ask(key):
            await gate.wait(key)
            served.append(key)
            gate.leave()

        tasks = [asyncio.create_task(ask(key)) for key in "aaaab"]
        await asyncio.sleep(0)
        assert not gate.try_enter()  # nobody overtakes those who wait
        gate.leave()
        await asyncio.gather(*tasks)
        return served, gate

    served, gate = asyncio.run(run())
    assert served == ["a", "b", "a", "a", "a"]
    assert (gate.num_running, gate.num_waiting) == (0, 0)


def test_a_full_waiting_room_takes_from_the_longest_queue():
    async def run():
        gate = Gate(1, 3, 5.0)
        gate.try_enter()
        greedy = [asyncio.create_task(gate.wait("greedy")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError, match="too many"):
            await gate.wait("greedy")
        modest = asyncio.create_task(gate.wait("modest"))
        await asyncio.sleep(0.01)
        assert [task.done() for task in greedy] == [False, False, True]
        with pytest.raises(BusyError, match="most requests"):
            await greedy[2]
        gate.leave()
        gate.leave()
        await asyncio.sleep(0)
        assert (greedy[0].done(), modest.done(), greedy[1].done()) == (True, True, False)
        greedy[1].cancel()
        await asyncio.gather(greedy[1], return_exceptions=True)
        assert (gate.num_running, gate.num_waiting) == (1, 0)

    asyncio.run(run())


def test_the_wait_has_a_limit():
    async def run():
        gate = Gate(1, 3, 0.05)
        gate.try_enter()
        with pytest.raises(BusyError, match=r"within 0.05 s"):
            await gate.wait("a")
        assert (gate.num_running, gate.num_waiting) == (1, 0)

    asyncio.run(run())


@given(st.integers(1, 3), st.integers(0, 4), st.integers(0, 1 << 30))
def test_no_place_is_lost_or_given_twice(places, room, seed):
    async def run():
        gate, rng, most = Gate(places, room, 0.02), random.Random(seed), 0

        async def ask(key, patience):
            nonlocal most
            try:
                async with asyncio.timeout(patience):
                    if not gate.try_enter():
                        await gate.wait(key)
            except (BusyError, TimeoutError):
                return
            most = max(most, gate.num_running)
            await asyncio.sleep(rng.choice([0, 0.001]))
            gate.leave()

        await asyncio.gather(*(ask(rng.choice("abc"), rng.choice([0.0, 0.001, 1.0])) for _ in range(20)))
        assert most <= places
        assert (gate.num_running, gate.num_waiting, len(gate._queues)) == (0, 0, 0)

    asyncio.run(run())


@given(st.lists(st.floats(0, 100), max_size=60), st.integers(1, 5))
def test_never_more_than_the_budget_in_any_minute(pauses, limit):
    budgets, now, taken = Budgets(), 1_800_000_000.0, []
    for pause in pauses:
        now += pause
        refused = budgets.take("k", limit, 0, now)
        if refused is None:
            taken.append(now)
        else:
            assert refused[0] == "requests_per_minute"
            assert 1 <= refused[1] <= 60
    assert all(sum(1 for t in taken if start <= t < start + 60) <= limit for start in taken)


def test_tokens_are_counted_by_day_and_survive_a_restart():
    noon = datetime(2026, 11, 21, 12, tzinfo=UTC).timestamp()
    budgets = Budgets()
    assert budgets.take("k", 0, 100, noon) is None
    budgets.charge("k", 60, noon)
    assert budgets.take("k", 0, 100, noon) is None
    budgets.charge("k", 60, noon)  # may overshoot by what runs at the same time
    assert budgets.take("k", 0, 100, noon) == ("tokens_per_day", 12 * 3600)
    assert budgets.take("other", 0, 100, noon) is None
    again = Budgets()
    again.restore(budgets.to_json())
    assert again.take("k", 0, 100, noon) == ("tokens_per_day", 12 * 3600)
    assert again.take("k", 0, 100, noon + 12 * 3600) is None
    again.restore({"day": "x", "tokens": None})  # what a damaged file holds counts as nothing


def _server(name, weight, running=0):
    upstream = Upstream(name, Weighted(f"http://{name}", weight).url, Settings(), weight=weight)
    upstream.num_running = running
    return upstream


def test_a_canary_gets_its_share_and_equals_share_by_load():
    servers = [_server("a", 95.0), _server("b", 5.0)]
    first = [order_by_load(servers, draw / 1000)[0].name for draw in range(1000)]
    assert (first.count("a"), first.count("b")) == (950, 50)
    assert [server.name for server in order_by_load(servers, 0.99)] == ["b", "a"]  # the other one stands in
    equals = [_server("a", 1.0, running=3), _server("b", 1.0, running=1), _server("c", 1.0, running=2)]
    assert [server.name for server in order_by_load(equals, 0.5)] == ["b", "c", "a"]
    assert order_by_load([], 0.5) == []
