"""The inside of the sandbox: gives up what an untrusted program must not have, then runs it.

`sandbox.py` starts this file as a script (`python -I guard.py ORDERS`, the program on stdin), so it imports nothing but
the standard library. What it gives up is gone for good, for root too: the kernel holds the process to it.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any

FILES = "files outside of its folder stay untouched and unread"
NETWORK = "no network, no other processes, no signals to them"

# Landlock (kernel 5.13 and newer) and seccomp, by number: the C library has no functions for them.
LANDLOCK_CREATE_RULESET, LANDLOCK_ADD_RULE, LANDLOCK_RESTRICT_SELF = 444, 445, 446
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR, REMOVE_FILE, MAKE_REG, TRUNCATE = (1 << i for i in (0, 1, 2, 3, 5, 8, 14))
RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}  # all of them, by version

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
ALLOW, EPERM, ENOSYS, KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
NEWEST = 462  # system calls that this table does not know do not exist
# What is refused, as (x86-64, arm64) numbers; None where an architecture has it not.
REFUSED: dict[str, tuple[int | None, int | None]] = {
    # the network
    "socket": (41, 198),
    "socketpair": (53, 199),
    "io_uring_setup": (425, 425),
    # other processes and threads
    "clone": (56, 220),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "process_mrelease": (448, 448),
    "kcmp": (312, 272),
    "setpriority": (141, 140),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # privileges
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # what processes share by a number or a name: it is others', and what is made of it outlives the process
    "shmget": (29, 194),
    "shmat": (30, 196),
    "shmctl": (31, 195),
    "semget": (64, 190),
    "semop": (65, 193),
    "semtimedop": (220, 192),
    "semctl": (66, 191),
    "msgget": (68, 186),
    "msgsnd": (69, 189),
    "msgrcv": (70, 188),
    "msgctl": (71, 187),
    "mq_open": (240, 180),
    "mq_unlink": (241, 181),
    # memory and disk that no limit counts
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "fallocate": (285, 47),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    # what Landlock leaves open: modes, owners and times of files, and truncation before its third version
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "fchown": (93, 55),
    "lchown": (94, None),
    "fchownat": (260, 54),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
}
PRLIMIT, FCNTL, PRCTL = (302, 261), (72, 25), (157, 167)
OWN_SIGNALS = 8, 10, 15  # F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to others by way of a pipe
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "arm64": (1, 0xC00000B7)}


def main() -> None:
    """Reads orders and program, gives up, reports what could not be given up, and runs the program."""
    orders: dict[str, Any] = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read().decode()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    missing = lock(orders)
    os.write(orders["report"], json.dumps(missing).encode())
    os.close(orders["report"])
    sys.argv = ["program"]
    exec(compile(program, "program", "exec"), {"__name__": "__main__", "PIPES": orders["pipes"]})


def lock(orders: dict[str, Any]) -> list[str]:
    """Gives up all that the orders do not grant; returns what this platform did not let it give up."""
    limit("CPU", orders["cpu_seconds"], orders["cpu_seconds"] + 1)
    limit("AS", orders["memory"])
    limit("FSIZE", orders["file_size"])
    limit("NOFILE", orders["open_files"])
    limit("CORE", 0)
    if sys.platform != "linux":
        limit("NPROC", orders["processes"])
        return [FILES, NETWORK]
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    missing = []
    if not landlock(libc, orders["readable"]) and not leave_root():
        missing.append(FILES)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != orders["parent"]:  # it died before it could be watched
        os._exit(1)
    # No capability, not even for root: version 3 of the header, this process, and three empty sets of 64 bits.
    libc.capset(struct.pack("Ii", 0x20080522, 0), bytes(24))
    if not seccomp(libc):
        limit("NPROC", orders["processes"])
        missing.append(NETWORK)
    return missing


def limit(name: str, soft: int, hard: int | None = None) -> None:
    """Sets a resource limit, as far as the platform has it and allows it."""
    kind = getattr(resource, f"RLIMIT_{name}", None)
    if kind is not None:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (soft, soft if hard is None else hard))


def landlock(libc: ctypes.CDLL, readable: Sequence[str]) -> bool:
    """Leaves the folder to write into, and `readable` to read; returns whether the kernel does that."""
    version = libc.syscall(LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return False
    handled = RIGHTS[max(known for known in RIGHTS if known <= version)]
    ruleset = libc.syscall(LANDLOCK_CREATE_RULESET, struct.pack("Q", handled), ctypes.c_size_t(8), 0)
    if ruleset < 0:
        return False

    def allow(path: str, rights: int) -> None:
        with contextlib.suppress(OSError):
            at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            if not os.path.isdir(path):
                rights &= READ_FILE | WRITE_FILE | EXECUTE | TRUNCATE
            libc.syscall(LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights & handled, at), 0)
            os.close(at)

    for path in readable:
        allow(path, EXECUTE | READ_FILE | READ_DIR)
    allow(os.devnull, READ_FILE | WRITE_FILE)
    # No folders in the folder, no links and no pipes: what it holds can be counted at a glance.
    allow(os.getcwd(), READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE)
    restricted = libc.syscall(LANDLOCK_RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return restricted


def leave_root() -> bool:
    """Becomes nobody, if it is root and nobody can read this Python; returns whether it did."""
    nobody = 65534
    if os.getuid() != 0 or not _readable_by_all(sys.prefix) or not _readable_by_all(sys.base_prefix):
        return False
    with contextlib.suppress(OSError):
        os.chown(os.getcwd(), nobody, nobody)
        os.setgroups([])
        os.setresgid(nobody, nobody, nobody)
        os.setresuid(nobody, nobody, nobody)
        return True
    return False


def _readable_by_all(path: str) -> bool:
    while path != os.path.dirname(path):
        if not os.stat(path).st_mode & 0o001:
            return False
        path = os.path.dirname(path)
    return True


def seccomp(libc: ctypes.CDLL) -> bool:
    """Refuses the system calls of `REFUSED`; returns whether the kernel does that."""
    if platform.machine() not in MACHINES:
        return False
    column, arch = MACHINES[platform.machine()]
    code: list[Callable[[int], bytes]] = []  # of the classic BPF machine; each gets its own position

    def load(offset: int) -> None:
        code.append(lambda at: struct.pack("HBBI", 0x20, 0, 0, offset))

    def when(opcode: int, value: int, then: str, otherwise: str = "") -> None:
        code.append(
            lambda at: struct.pack(
                "HBBI",
                opcode,
                labels[then] - at - 1 if then else 0,
                labels[otherwise] - at - 1 if otherwise else 0,
                value,
            )
        )

    equal, greater = 0x15, 0x25
    labels: dict[str, int] = {}
    load(4)
    when(equal, arch, "", "kill")
    load(0)
    when(greater, NEWEST, "unknown")
    when(equal, 435, "unknown")  # clone3: without it the C library takes clone
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            when(equal, number, "refuse")
    when(equal, PRLIMIT[column], "prlimit")
    when(equal, FCNTL[column], "fcntl")
    when(equal, PRCTL[column], "prctl", "allow")
    labels["prlimit"] = len(code)
    load(16)  # its first argument: 0 is this process
    when(equal, 0, "allow", "refuse")
    labels["fcntl"] = len(code)
    load(24)
    for command, otherwise in zip(OWN_SIGNALS, ("", "", "allow"), strict=True):
        when(equal, command, "refuse", otherwise)
    labels["prctl"] = len(code)
    load(16)
    when(equal, PR_SET_PDEATHSIG, "refuse")  # it ends when the sandbox's own process does
    for name, verdict in (("allow", ALLOW), ("refuse", EPERM), ("unknown", ENOSYS), ("kill", KILL)):
        labels[name] = len(code)
        code.append(lambda at, verdict=verdict: struct.pack("HBBI", 0x06, 0, 0, verdict))  # type: ignore[misc]
    program = ctypes.create_string_buffer(b"".join(make(at) for at, make in enumerate(code)))
    handed = struct.pack("HP", len(code), ctypes.addressof(program))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, handed, 0, 0) == 0)


if __name__ == "__main__":
    main()
