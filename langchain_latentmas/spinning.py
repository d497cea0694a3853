"""How long torch's threads spin while they wait for each other: to be imported before torch is.

Alone on two cores, a step of the bundled model's recipe took 0.94 s with 2,000 turns, some 10 µs, and 1.21 s with none
(`OMP_WAIT_POLICY=PASSIVE`): threads that sleep are slow to wake. Beside a process that kept one core busy it took 1.98
and 1.75 s. libgomp's own default, some milliseconds, does as well alone, but makes a pass many times slower once
something else needs a core.
"""

import os

if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
