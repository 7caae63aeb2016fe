"""What a run may ask of its text teachers, and what it has spent of that."""

from __future__ import annotations

import threading
import time

from attrs import frozen

from kdcore.errors import BudgetError

__all__ = ["Budget", "Spending"]


@frozen
class Budget:
    """What a run may ask of its text teachers; None is no limit.

    :param max_cost: in the currency of the models' prices, over all starts of the run.
    :param max_requests: answers asked for and not found in the journal, over all starts of the run.
    :param max_seconds: from the first request of this start.
    """

    max_cost: float | None = None
    max_requests: int | None = None
    max_seconds: float | None = None


class Spending:
    """What has been spent of a budget, counted by several threads."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._lock = threading.Lock()
        self._began: float | None = None
        self._requests, self._price = 0, 0.0

    def resume(self, requests: int, price: float) -> None:
        """Go on from what earlier starts of the run have spent."""
        with self._lock:
            self._requests, self._price = requests, price

    def begin(self) -> None:
        """Count a request.

        :raises BudgetError: the budget is spent.
        """
        with self._lock:
            self._began = self._began or time.monotonic()
            self._refuse("max_requests", self._requests)
            self._refuse_if_spent()
            self._requests += 1

    def refuse_if_spent(self) -> None:
        """What a request that has begun may ask again before it costs something.

        :raises BudgetError: money or time is spent.
        """
        with self._lock:
            self._refuse_if_spent()

    def answered(self, price: float) -> None:
        """Count what an answer cost."""
        with self._lock:
            self._price += price

    def failed(self) -> None:
        """Count a request no more: it has no answer."""
        with self._lock:
            self._requests -= 1

    def _refuse_if_spent(self) -> None:
        self._refuse("max_cost", self._price)
        if self._began is not None:
            self._refuse("max_seconds", time.monotonic() - self._began)

    def _refuse(self, limit: str, spent: float) -> None:
        most = getattr(self._budget, limit)
        if most is not None and spent >= most:
            flag = "--" + limit.replace("_", "-")
            raise BudgetError(
                f"the budget is spent: {spent:,.4g} of {limit} {most:,.4g}; every answer is kept, go on with a larger "
                f"{flag}"
            )
