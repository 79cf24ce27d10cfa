"""The fair queue: turns of clients, slots that are neither lost nor given twice, and what a full queue says."""

import random

import pytest

from utils.serving.errors import ApiError
from utils.serving.queue import FairQueue, Ticket


def test_clients_take_turns_however_many_jobs_they_have():
    queue, order = FairQueue(max_batch_size=1, max_waiting=10), []
    turns = {}
    for client_name, job in [("a", 1), ("a", 2), ("a", 3), ("a", 4), ("b", 1), ("b", 2), ("c", 1)]:
        name = f"{client_name}{job}"
        turns[name] = Ticket(client_name, lambda name=name: order.append(name))
        queue.enter(turns[name])
    assert order == ["a1"]
    while len(order) < 7:
        queue.leave(turns[order[-1]])
    assert order == ["a1", "a2", "b1", "c1", "a3", "b2", "a4"]


def test_slots_are_never_lost_nor_given_twice():
    chance = random.Random(0)
    queue = FairQueue(max_batch_size=3, max_waiting=1000)
    alive = []
    for _ in range(3000):
        if alive and chance.random() < 0.5:
            queue.leave(alive.pop(chance.randrange(len(alive))))  # running or waiting
        else:
            ticket = Ticket(chance.choice("abcd"), lambda: None)
            alive.append(ticket)
            queue.enter(ticket)
        running = sum(ticket.started is not None for ticket in alive)
        assert queue.running == running == min(3, len(alive))
        assert queue.waiting == len(alive) - running


def test_a_full_queue_says_when_to_come_back():
    queue = FairQueue(max_batch_size=2, max_waiting=3)
    turns = [Ticket("a", lambda: None) for _ in range(4)]
    for ticket in turns:
        queue.enter(ticket)
    queue.check_room(1)
    with pytest.raises(ApiError) as busy:
        queue.check_room(2)
    assert busy.value.status == 429 and 1 <= int(busy.value.headers["Retry-After"]) <= 60
    with pytest.raises(ApiError) as never:
        queue.check_room(6)
    assert never.value.status == 400
    queue.leave(turns[0])
    queue.check_room(2)
