"""Items made ahead: the right ones, never more than asked for, errors where they belong."""

import threading

import jax
import numpy as np
import pytest

from lorafusion_jax.train.feed import DeviceFeed, Feed


@pytest.fixture
def made():
    return []


@pytest.fixture
def feed(made):
    def make(key):
        made.append((key, threading.current_thread() is threading.main_thread()))
        if key == "bad":
            raise ValueError("cannot make it")
        return f"item {key}"

    feed = Feed(make)
    yield feed
    feed.close()


def test_items_come_from_the_thread_once_each(feed, made):
    keys = list(range(6))
    got = [feed.get(key, keys[key + 1 : key + 3]) for key in keys]
    assert got == [f"item {key}" for key in keys]
    assert sorted(made) == [(0, True), *((key, False) for key in keys[1:])]


def test_what_was_not_announced_is_made_on_the_spot(feed, made):
    feed.get(0, [1, 2])
    assert feed.get(7, [8]) == "item 7"
    assert (7, True) in made
    assert feed.get(8) == "item 8" and (8, False) in made
    assert feed.get(1) == "item 1" and (1, True) in made  # dropped when 7 was asked for


def test_an_error_is_raised_for_its_own_key_only(feed):
    assert feed.get(0, [1, "bad"]) == "item 0"
    assert feed.get(1, ["bad", 2]) == "item 1"
    with pytest.raises(ValueError, match="cannot make it"):
        feed.get("bad", [2])
    assert feed.get(2) == "item 2"


def test_closing_ends_the_thread(made):
    feed = Feed(str)
    feed.get(0, [1])
    names = {thread.name for thread in threading.enumerate()}
    feed.close()
    left = {thread.name for thread in threading.enumerate()}
    assert any(name.startswith("feed") for name in names) or not names - left
    with pytest.raises(RuntimeError):
        feed.get(2, [3])


def numbers(key):
    if key == 3:
        raise ValueError("cannot make it")
    return np.full(2, key)


def test_the_next_item_is_on_the_device_before_it_is_asked_for(monkeypatch):
    put, placed = jax.device_put, []
    monkeypatch.setattr(jax, "device_put", lambda x: placed.append(int(x[0])) or put(x))
    feed = DeviceFeed(numbers)
    item, on_device = feed.get(0, [1, 2])
    assert placed == [0, 1]
    assert isinstance(on_device, jax.Array) and (item == np.asarray(on_device)).all()
    item, on_device = feed.get(1, [2, 4])
    assert placed == [0, 1, 2]  # each once
    assert item[0] == 1 == on_device[0]
    item, on_device = feed.get(7, [])  # the plan has changed
    assert placed == [0, 1, 2, 7] and item[0] == 7 == on_device[0]
    assert feed.on_host(2)[0] == 2 and placed[-1] == 7
    feed.close()


def test_an_item_that_cannot_be_made_leaves_those_before_it():
    feed = DeviceFeed(numbers)
    assert feed.get(2, [3])[0][0] == 2
    with pytest.raises(ValueError, match="cannot make it"):
        feed.get(3, [4])
    assert feed.get(4)[0][0] == 4
    feed.close()
