"""What comes from outside, changed at random: `python -m tests.mutations` prints what became of 10,000 of each kind.

Every mutant must be refused with an error of `langchain_latentmas.errors`, and nothing may allocate more than 64 MiB:
the process may not grow by more than that from the first mutant on (`RLIMIT_DATA`), so what tries gets a `MemoryError`.
"""

import argparse
import copy
import hashlib
import json
import logging
import os
import random
import resource
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from langchain_latentmas.errors import LatentMASError
from langchain_latentmas.service.local import LocalService

from .support import PARITY, messages, say

LIMIT = 64 << 20
OUTCOMES = ("refused", "accepted", "foreign exception")
Mutants = Generator[Callable[[], Any], None, None]


def flipped(rng: random.Random, data: bytes, start: int = 0, end: int | None = None) -> bytes:
    """One to eight changed bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        changed[rng.randrange(start, end or len(data))] ^= rng.randrange(1, 256)
    return bytes(changed)


def file_mutant(rng: random.Random, file: bytes, others: list[bytes]) -> bytes:
    """A changed file: flipped, cut, grown, spliced, with hostile lengths, of a later version, or re-checksummed."""
    at, other = rng.randrange(len(file)), rng.choice(others)
    magic, version, kind, header, payload = struct.unpack_from("<8sHHIQ", file)
    huge = rng.choice((0, 1, header + 1, 2**20, 2**31, 2**32 - 1))

    def started(*fields: Any) -> bytes:
        return struct.pack("<8sHHIQ", *fields) + file[24:]

    def checksummed(body: bytes) -> bytes:
        return body + hashlib.sha256(body).digest() + file[-32:]

    return rng.choice(
        [
            lambda: flipped(rng, file),
            lambda: flipped(rng, file, 0, 24),
            lambda: flipped(rng, file, 24, 24 + header),
            lambda: flipped(rng, file, len(file) - 64),
            lambda: file[:at],
            lambda: file[at:],
            lambda: file[:at] + file[at + rng.randrange(1, 64) :],
            lambda: file[:at] + rng.randbytes(rng.randrange(1, 64)) + file[at:],
            lambda: file + rng.randbytes(rng.randrange(1, 5000)),
            lambda: file[:at] + bytes(len(file) - at),
            lambda: file[:at] + other[at:],
            lambda: other,
            lambda: b"",
            lambda: rng.randbytes(rng.randrange(1, 2000)),
            lambda: started(magic, rng.randrange(2, 2**16), kind, header, payload),
            lambda: started(magic, version, kind, huge, payload),
            lambda: started(magic, version, kind, header, rng.choice((0, 2**31, 2**40, 2**63, 2**64 - 1))),
            lambda: started(magic, version, kind ^ 3, header, payload),
            lambda: checksummed(flipped(rng, file[:-64], 24)),
            lambda: checksummed(file[:24] + file[24:-64].replace(b'"agent":"', b'"agent":"x', 1)),
        ]
    )()


def json_mutant(rng: random.Random, ref: Any, others: list[Any]) -> Any:
    """A changed reference: other values, types, fields; fields of another reference; no mapping at all."""
    changed, field = copy.deepcopy(dict(ref)), rng.choice(list(ref))
    value = changed[field]
    anything = rng.choice(
        [None, True, -1, 0, 2**63, 10**400, 0.5, float("nan"), "", "x" * 10**5, [], {}, [[]] * 99, b"", ["lat_"], value]
    )
    text = value if isinstance(value, str) else json.dumps(value)
    at = rng.randrange(len(text) + 1)
    edited = (
        text[:at] + chr(rng.choice((0, 32, 46, 48, 97, 102, 0xE9, 0xD800, 0x1F30D))) + text[at + rng.randrange(2) :]
    )
    mutants: list[Callable[[], Any]] = [
        lambda: changed | {field: anything},
        lambda: changed | {field: edited if isinstance(value, str) else [edited]},
        lambda: changed | {field: value + rng.choice((-1, 1, 2**32)) if isinstance(value, int) else [value, value]},
        lambda: changed | {field: rng.choice(others)[field]},
        lambda: changed | {"id": changed["id"] + rng.choice((".zeroed", ".random1", ".zeroed" * 10, "\n"))},
        lambda: changed | {rng.choice(("url", "path", "__class__", "store")): "http://127.0.0.1/../../etc/passwd"},
        lambda: {key: kept for key, kept in changed.items() if key != field},
        lambda: changed | {"parents": [changed["id"]] * rng.choice((1, 1025, 5000))},
        lambda: [changed, changed][: rng.randrange(1, 3)][0] | {"mac": changed["mac"][::-1]},
        lambda: rng.choice([None, 7, "lat_", [ref], json.dumps(ref), changed["id"], {}]),
    ]
    return rng.choice(mutants)()


def marker_mutant(rng: random.Random, marker: str, others: list[str]) -> str:
    """A changed marker of which enough is left to be seen: edited, cut behind its id, or with parts of another one."""
    at = rng.randrange(len(marker))
    agent, other = marker.split()[1], rng.choice(others)
    letters = "0123456789abcdefXYZ.-_+%é\0"
    near = marker.index("lat_") + 12
    return rng.choice(
        [
            lambda: marker[:at] + rng.choice(letters) + marker[at + 1 :],
            lambda: marker[: at or 1] + rng.choice(letters) + marker[at or 1 :],  # within, so not before the bracket
            lambda: marker[:at] + marker[at + 1 :],
            lambda: marker[: rng.randrange(near, len(marker))],
            lambda: marker[rng.randrange(1, marker.index("lat_")) :],
            lambda: marker.replace(agent, rng.choice(("judger", "x" * 5000, "%00", "a%5D", agent + "%20")), 1),
            lambda: marker.replace(" steps", f"{rng.randrange(1, 10**6)} steps", 1),
            lambda: marker[: marker.rindex(".")] + other[other.rindex(".") :],
            lambda: marker.replace(".", rng.choice((".zeroed.", ".random1.", "..")), 1),
            lambda: marker.upper(),
            lambda: marker[:-2] + rng.choice("0123456789abcdef") * 2 + "]",
        ]
    )()


class Target:
    """A service with some memories, and what its users and its folder hold of them."""

    def __init__(self, folder: Path) -> None:
        self.service = LocalService.load(
            str(PARITY / "qwen3-tied" / "model"), device="cpu", store=folder, kv_budget=0, kv_disk_budget="1GiB"
        )
        plan = self.service.think(messages("Plan."), steps=3, agent="planner")
        other = self.service.think(messages("Plan it otherwise."), steps=5, agent="Plänner [2]")
        both = self.service.think(messages("Compare."), [plan, other], steps=2, agent="critic")
        said = say(self.service, messages("Speak."), [both], agent="judger")
        self.refs = [plan, other, both, said.ref]
        self.markers = [self.service.marker(ref) for ref in self.refs]
        disk = self.service._pool.disk
        assert disk is not None
        disk.flush()
        self.disk = disk
        ids = [ref["id"] for ref in self.refs]
        self.recipes = {key: (folder / "recipes" / f"{key}.recipe").read_bytes() for key in ids}
        self.spilled = {key: (folder / "kv" / f"{key}.kv").read_bytes() for key in ids}
        self.folder = folder

    def references(self, rng: random.Random) -> Mutants:
        while True:
            ref = rng.choice(self.refs)
            mutant = json_mutant(rng, ref, self.refs)
            if mutant != ref:
                yield lambda mutant=mutant: self.service.marker(mutant)  # type: ignore[misc]

    def texts(self, rng: random.Random) -> Mutants:
        while True:
            marker = rng.choice(self.markers)
            mutant = marker_mutant(rng, marker, self.markers)
            if "".join(mutant.split()) not in map("".join, map(str.split, self.markers)):  # whitespace says nothing
                yield lambda mutant=mutant: self.service.take_markers(f"The plan: {mutant} Go on.")  # type: ignore[misc]

    def recipe_files(self, rng: random.Random) -> Mutants:
        others = [*self.recipes.values(), *self.spilled.values()]
        for key, mutant in self._files(rng, self.recipes, others):
            path = self.folder / "recipes" / f"{key}.recipe"
            path.write_bytes(mutant)
            try:
                yield lambda key=key: self.service._store.get(key)  # type: ignore[misc]
            finally:
                (refused,) = (self.folder / "recipes.aside").iterdir()
                assert refused.read_bytes() == mutant  # set aside as it was
                refused.unlink()
                path.write_bytes(self.recipes[key])

    def spill_files(self, rng: random.Random) -> Mutants:
        positions = {key: self.service._recipe(key).segment.positions for key in self.spilled}
        others = [*self.recipes.values(), *self.spilled.values()]
        for key, mutant in self._files(rng, self.spilled, others):
            (self.folder / "kv" / f"{key}.kv").write_bytes(mutant)
            yield lambda key=key: self.disk.get(key, positions[key]).result()  # type: ignore[misc]

    @staticmethod
    def _files(
        rng: random.Random, files: dict[str, bytes], others: list[bytes]
    ) -> Generator[tuple[str, bytes], None, None]:
        while True:
            key = rng.choice(list(files))
            if (mutant := file_mutant(rng, files[key], others)) != files[key]:
                yield key, mutant


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        result = call()
    except LatentMASError as error:
        return "refused", type(error).__name__
    except BaseException as error:  # whatever else it is, it is what this looks for
        return "foreign exception", f"{type(error).__name__}: {str(error)[:200]}"
    return "accepted", repr(result)[:200]


def limit_memory() -> None:
    """From here on the process may take 64 MiB more; proves that it holds."""
    status = Path("/proc/self/status").read_text()
    data = int(status.split("VmData:")[1].split()[0]) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (data + LIMIT, resource.RLIM_INFINITY))
    try:
        bytearray(LIMIT + (1 << 20))
    except MemoryError:
        return
    raise AssertionError("the limit of memory does not hold on this system")


def main(count: int, seed: int) -> int:
    logging.disable()
    print(f"{count} mutants of each kind, seed {seed}")
    print(f"{'':<20}" + "".join(f"{name:>20}" for name in OUTCOMES) + "   as")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        target = Target(Path(folder))
        assert outcome(lambda: target.service.marker(target.refs[0]))[0] == "accepted"
        kinds = {
            "references": target.references,
            "markers": target.texts,
            "recipe files": target.recipe_files,
            "spill files": target.spill_files,
        }
        for mutants_of in kinds.values():  # so that everything is loaded before the limit
            first = mutants_of(random.Random(seed))
            outcome(next(first))
            first.close()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        limit_memory()
        for name, mutants_of in kinds.items():
            counts: Counter[str] = Counter()
            errors: Counter[str] = Counter()
            mutants = mutants_of(random.Random(f"{name} {seed}"))
            for _ in range(count):
                result, what = outcome(next(mutants))
                counts[result] += 1
                if result == "refused":
                    errors[what] += 1
                elif counts[result] <= 5:
                    print(f"  {name} {result}: {what}", file=sys.stderr)
            failed += count - counts["refused"]
            named = ", ".join(f"{error} {n}" for error, n in errors.most_common())
            print(f"{name:<20}" + "".join(f"{counts[each]:>20}" for each in OUTCOMES) + f"   {named}", flush=True)
            mutants.close()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        print(f"no allocation over {LIMIT >> 20} MiB; all mutants together made the process {grown:.1f} MiB larger")
        target.service.close()
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=10_000, help="mutants of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sys.exit(1 if main(arguments.count, arguments.seed) else 0)
