"""What the agents of a team are told, per family of tasks."""

from collections.abc import Mapping
from typing import NamedTuple

from .. import teams


class Roles(NamedTuple):
    """The system prompts of one family of tasks."""

    sequential: Mapping[str, str]
    """By agent name, in the order in which they think."""
    hierarchical: Mapping[str, str]
    """By agent name; blind to each other."""
    judger: str
    """Who reads them and answers."""
    solver: str
    """Who answers alone."""

    def thinkers(self, arrangement: str) -> list[str]:
        """Names of those who hand something on: none in the arrangement "single"."""
        return list({"sequential": self.sequential, "hierarchical": self.hierarchical}.get(arrangement, {}))


BUNDLED = Roles(teams.SEQUENTIAL, teams.HIERARCHICAL, teams.JUDGER, teams.SOLVER)
"""Word for word what the bundled model was trained with."""
_BOXED = " Write it as \\boxed{number}."
BOXED = BUNDLED._replace(judger=teams.JUDGER + _BOXED, solver=teams.SOLVER + _BOXED)
"""The same for models that were not trained to answer that way."""
