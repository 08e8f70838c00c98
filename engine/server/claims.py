"""Names that workers claim: function ids, trigger types, trigger ids. Each belongs to one token at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Generic, TypeVar

from scopestate.errors import Forbidden

if TYPE_CHECKING:
    from scopestate.server.access import Access
    from scopestate.server.worker import Worker

MAX_KEPT: Final = 1_000
"""Names that are kept for one token while no worker offers them; one more, and the oldest is free for all."""
MAX_KEPT_LENGTH: Final = 256
"""A longer name is not kept."""

T = TypeVar("T")


class Claims(Generic[T]):
    """Name -> what workers offer under it; of several the newest serves, and when it goes, the one before.

    All workers that offer the same name have the same token (`Worker.access`; without tokens, None for all). When the
    last of them is disconnected, the name is kept for the token as long as another of its workers is connected: in the
    second that a restart takes, no other token can put itself in its place. On the server's event loop only.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._offers: dict[str, dict[Worker, T]] = {}
        self._kept: dict[str, Access] = {}
        self._kept_of: dict[Access, dict[str, None]] = {}

    def __len__(self) -> int:
        return len(self._offers)

    def offered_by(self, worker: Worker) -> list[str]:
        """Return the names that this worker offers, whether it serves them or not."""
        return [name for name, offers in self._offers.items() if worker in offers]

    def serving(self, name: str) -> T | None:
        """Return what serves this name; None: nothing does."""
        offers = self._offers.get(name)
        return None if offers is None else next(reversed(offers.values()))

    def all(self) -> list[T]:
        """Return what serves each name."""
        return [next(reversed(offers.values())) for offers in self._offers.values()]

    def only_by(self, name: str, worker: Worker) -> bool:
        """Return whether this worker, and no other, offers the name."""
        offers = self._offers.get(name)
        return offers is not None and len(offers) == 1 and worker in offers

    def belongs_to(self, name: str, access: Access | None) -> bool:
        """Return whether the name is offered by, or kept for, the workers of this token."""
        offers = self._offers.get(name)
        if offers is not None:
            return next(iter(offers)).access is access
        return access is not None and self._kept.get(name) is access

    def check(self, name: str, access: Access | None) -> None:
        """Raise Forbidden if the name belongs to another token."""
        if (name in self._offers or name in self._kept) and not self.belongs_to(name, access):
            raise Forbidden(f"{self._what} {name!r} is another worker's, which has another token: choose another")

    def put(self, name: str, worker: Worker, offer: T) -> None:
        """Have this worker serve the name, which `check` has passed; what it offered before is replaced."""
        self._release(name)
        offers = self._offers.setdefault(name, {})
        offers.pop(worker, None)
        offers[worker] = offer

    def remove(self, name: str, worker: Worker, *, keep: bool) -> bool:
        """Forget what this worker offers; return whether it was what served the name.

        `keep`: if it was the last, keep the name for the token. For a worker that is lost, not for one that withdraws.
        """
        offers = self._offers.get(name)
        if offers is None or worker not in offers:
            return False
        served = next(reversed(offers)) is worker
        del offers[worker]
        if not offers:
            del self._offers[name]
            if keep and worker.access is not None:
                self._keep(name, worker.access)
        return served

    def clear(self, name: str) -> list[T]:
        """Forget all that is offered under this name, and return it; the name is free then."""
        return list(self._offers.pop(name, {}).values())

    def last_worker_left(self, access: Access) -> None:
        """No worker of this token is connected any more: nothing is kept for it."""
        for name in self._kept_of.pop(access, ()):
            del self._kept[name]

    def _keep(self, name: str, access: Access) -> None:
        if len(name) > MAX_KEPT_LENGTH:
            return
        kept = self._kept_of.setdefault(access, {})
        kept[name] = None
        self._kept[name] = access
        if len(kept) > MAX_KEPT:
            self._release(next(iter(kept)))

    def _release(self, name: str) -> None:
        access = self._kept.pop(name, None)
        if access is not None:
            del self._kept_of[access][name]
