"""What the next microbatches need, made ready by a thread while the device works on this one."""

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor


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
