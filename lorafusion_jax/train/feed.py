"""What the next microbatches need, made ready by a thread while the device works on this one."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import jax


class Feed[Key: Hashable, Item]:
    """Makes items ahead of their use, in a thread.

    An item must be a function of its key alone: then it does not matter which thread made it, when,
    or how often. What is asked for without having been announced is made on the spot.

    Args:
        make: makes the item of a key; whatever it raises is raised by `get`.
    """

    def __init__(self, make: Callable[[Key], Item]):
        self._make = make
        self._pool = ThreadPoolExecutor(1, "feed")
        self._pending: dict[Key, Future[Item]] = {}

    def get(self, key: Key, ahead: Sequence[Key] = ()) -> Item:
        """Returns the item of a key.

        Args:
            key: of the item.
            ahead: keys to start on now; what was announced before and is not among them is dropped,
                so that never more than these wait.
        """
        future = self._pending.pop(key, None)
        for stale in [pending for pending in self._pending if pending not in ahead]:
            self._pending.pop(stale).cancel()
        item = self._make(key) if future is None else future.result()
        for coming in ahead:
            if coming not in self._pending:
                self._pending[coming] = self._pool.submit(self._make, coming)
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)


class DeviceFeed[Key: Hashable, Item]:
    """A feed whose items lie on the device one ahead of their use.

    A copy to a GPU begins when all that was dispatched before it has ended. Asked for after the
    step before it, it would leave the device idle between the two; so it is asked for earlier.

    It is asked for by the caller's thread, not by the one that makes the items: what is allocated
    while a step is dispatched comes to lie behind its temporaries, and keeps those of a later step,
    one piece of half an H100, from the only place where they fit.

    Args:
        make: makes the item of a key, on the host; as for `Feed`.
    """

    def __init__(self, make: Callable[[Key], Item]):
        self._feed = Feed(make)
        self._next: tuple[Key, Item, Item] | None = None

    def on_host(self, key: Key) -> Item:
        """Returns the item of a key, not put on the device."""
        return self._feed.get(key)

    def get(self, key: Key, ahead: Sequence[Key] = ()) -> tuple[Item, Item]:
        """Returns the item of a key, on the host and on the device.

        Args:
            key: of the item.
            ahead: keys to come; the first is put on the device too, the others are made.
        """
        if self._next is not None and self._next[0] == key:
            _, item, placed = self._next
        else:
            item = self._feed.get(key, ahead)
            placed = jax.device_put(item)
        self._next = None
        if ahead:
            try:
                coming = self._feed.get(ahead[0], ahead[1:])
            except Exception:  # it is made again in its own turn, and raised there
                return item, placed
            self._next = ahead[0], coming, jax.device_put(coming)
        return item, placed

    def close(self) -> None:
        """Ends the thread."""
        self._next = None
        self._feed.close()
