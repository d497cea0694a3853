"""How long a call is repeated."""

import time

import tenacity
from tenacity.stop import stop_base


class Patience(stop_base):
    """Stops so many seconds after the first failure; what a call worked before it failed is not waiting."""

    def __init__(self, seconds: float) -> None:
        """For one call.

        Args:
            seconds: How long.
        """
        self.seconds, self._since = seconds, float("inf")

    def __call__(self, retry_state: tenacity.RetryCallState) -> bool:
        """Whether that is over; called after each failure."""
        self._since = min(self._since, time.monotonic())
        return time.monotonic() - self._since >= self.seconds
