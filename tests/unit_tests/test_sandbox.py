"""Hostile programs: what they try must not happen, whatever they report about it."""

import ctypes
import errno
import os
import re
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from langchain_latentmas.errors import SandboxUnavailable
from langchain_latentmas.evaluation import sandbox
from langchain_latentmas.evaluation.graders import Checks, code
from langchain_latentmas.evaluation.guard import FILES, NETWORK
from langchain_latentmas.evaluation.sandbox import Limits, Outcome, run

from ..support import wait_for

SECRET = "sk-this-must-not-leak"
LIMITS = Limits(seconds=4, cpu_seconds=2, memory=512 << 20)
DOUBLE = Checks("double", "assert double(2) == 4\nassert double(5) == 10\n")

# Each of them would, if it could. {outside}: a folder of somebody else, {port}: a server that listens, {victim}: a
# process of the same user, {segment}: shared memory of another.
HOSTILE = {
    "fork bomb": "import os\nwhile True: os.fork()",
    "fork bomb that does not give up": """
import os
while True:
    try: os.fork()
    except OSError: pass""",
    "thread bomb": "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(60,)).start()",
    "memory": "held = []\nwhile True: held.append(bytearray(1 << 24))",
    "memory at once": "held = bytearray(1 << 40)",
    "one large file": "with open('f', 'wb') as f:\n    while True: f.write(bytes(1 << 20))",
    "many files": """
import itertools
for i in itertools.count():
    with open(f'f{{i}}', 'wb') as f: f.write(bytes(1 << 19))""",
    "empty files": "import itertools\nfor i in itertools.count(): open(f'f{{i}}', 'w').close()",
    "nested folders": "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
    "infinite loop": "while True: pass",
    "waits": "import time\ntime.sleep(3600)",
    "ignores signals": """
import signal, time
for number in set(signal.valid_signals()) - {{signal.SIGKILL, signal.SIGSTOP}}: signal.signal(number, signal.SIG_IGN)
while True: time.sleep(1)""",
    "ignores the end of its CPU time": "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', {port})).send(b'hello')",
    "network by another name": """
import urllib.request
urllib.request.urlopen('http://127.0.0.1:{port}/', timeout=2)""",
    "reads the environment": "import os\nprint(dict(os.environ))",
    "reads its parent's environment": "import os\nprint(open(f'/proc/{{os.getppid()}}/environ').read())",
    "reads a file": "print(open({outside!r} + '/secret').read())",
    "writes outside": "open({outside!r} + '/planted', 'w').write('x')",
    "overwrites a file": "open({outside!r} + '/secret', 'w').write('x')",
    "removes a file": "import os\nos.remove({outside!r} + '/secret')",
    "changes a mode": "import os\nos.chmod({outside!r} + '/secret', 0)",
    "links outside": "import os\nos.symlink({outside!r} + '/secret', 'f')\nopen('f', 'w').write('x')",
    "leaves something in /tmp": "open('/tmp/latentmas-planted', 'w').write('x')",
    "leaves something in shared memory": "open('/dev/shm/latentmas-planted', 'w').write('x')",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "kills another": "import os, signal\nos.kill({victim}, signal.SIGKILL)",
    "kills everybody": "import os, signal\nos.kill(-1, signal.SIGKILL)",
    "limits its parent": """
import os, resource
resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE, (0, 0))""",
    "signals by way of a pipe": """
import fcntl, os
read, write = os.pipe()
fcntl.fcntl(read, fcntl.F_SETOWN, {victim})
fcntl.fcntl(read, 10, 9)
fcntl.fcntl(read, fcntl.F_SETFL, os.O_ASYNC)
os.write(write, b'x')""",
    "reads and overwrites shared memory": """
import ctypes
libc = ctypes.CDLL(None)
libc.shmat.restype = ctypes.c_void_p
at = libc.shmat({segment}, None, 0)
assert at != 2**64 - 1
print(ctypes.string_at(at))
ctypes.memset(at, 0, 8)""",
    "removes shared memory": """
import ctypes
assert ctypes.CDLL(None).shmctl({segment}, 0, None) == 0""",
    "much output": "while True: print('x' * 10_000)",
    "much output on stderr": "import sys\nwhile True: print('x' * 10_000, file=sys.stderr)",
    "becomes a daemon": """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(3600)""",
    "another program": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo x > {outside}/planted; sleep 3600'])",
    "a shell": "import subprocess\nsubprocess.run('echo x > {outside}/planted', shell=True, check=True)",
    "C code": """
import ctypes
libc = ctypes.CDLL(None)
assert libc.kill({victim}, 9) == 0 or libc.socket(2, 1, 0) >= 0 or libc.unshare(0x10000000) == 0""",
    "gives itself a longer life": """
import ctypes, resource
ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)
resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))
while True: pass""",
    "crashes": "import ctypes\nctypes.string_at(0)",
}

# So ends a program that never came to what it was written for.
MISWRITTEN = re.compile(r"^(Syntax|Indentation|Name|Import|ModuleNotFound)Error\b", re.MULTILINE)

# Each of them claims to be right, and `double` of none of them is.
CHEATS = {
    "ends before its tests": "import os\nos._exit(0)",
    "ends in its tests": "import os\ndef double(x): os._exit(0)",
    "leaves in its tests": "import sys\ndef double(x): sys.exit(0)",
    "prints a pass": "print('passed')\nprint('ok')\ndef double(x):\n    print('passed')\n    return None",
    "equals everything": """
class Always(int):
    def __eq__(self, other): return True
    def __hash__(self): return 0
def double(x): return Always()""",
    "equals everything, as an int that pickles itself": """
class Always(int):
    def __eq__(self, other): return True
    def __reduce__(self): return (eval, ("type('A', (int,), {'__eq__': lambda s, o: True})()",))
def double(x): return Always()""",
    "replaces builtins": """
import builtins
builtins.AssertionError = Exception
builtins.compile = lambda *a, **k: builtins.exec
builtins.exec = lambda *a, **k: None
def double(x): return None""",
    "switches asserts off": "import sys\nsys.flags = None\n__debug__x = False\ndef double(x): return None",
    "writes its own answer": """
import os, pickle, struct
made = pickle.dumps(('value', 4))
def double(x):
    os.write(PIPES[1], struct.pack('Q', len(made)) + made)
    os._exit(0)
import sys
PIPES = sys._getframe(1).f_locals['pipes']""",
    "answers with code": """
import pickle, struct, sys, os
class Evil:
    def __reduce__(self): return (os._exit, (0,))
pipes = sys._getframe(1).f_locals['pipes']
made = pickle.dumps(('value', Evil()))
os.write(pipes[1], struct.pack('Q', len(made)) + made)
def double(x): return None""",
    "rewrites a type of its tests": """
import collections, os, struct, sys
made = b'''(Vvalue
ccollections
Counter
(N}V__eq__
cbuiltins
slice
stb)Rt.'''
os.write(sys._getframe(1).f_locals['pipes'][1], struct.pack('Q', len(made)) + made)
def double(x): return collections.Counter()""",
    "answers without end": """
import struct, sys, os
pipes = sys._getframe(1).f_locals['pipes']
os.write(pipes[1], struct.pack('Q', 1 << 62) + bytes(1000))
def double(x): return None""",
    "raises what ends the tests": "def double(x): raise SystemExit(0)",
    "closes its pipes": "import os\nos.closerange(3, 100)\ndef double(x): return 2 * x",
    "never answers": "import time\ndef double(x): time.sleep(3600)",
    "an endless iterator": "import itertools\ndef double(x): return itertools.repeat(4)",
    "is no program": "def double(x) return 2 * x",
    "is nothing": "",
}


class World(NamedTuple):
    """What must stay as it was."""

    outside: Path
    connections: list[object]
    names: dict[str, object]


@pytest.fixture
def segment() -> Iterator[int]:
    """The number of shared memory with a secret, which is still there in the end."""
    libc = ctypes.CDLL(None)
    libc.shmat.restype, libc.shmdt.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    number = libc.shmget(0, 4096, 0o1600)

    @contextmanager
    def attached() -> Iterator[int]:
        at = libc.shmat(number, None, 0)
        assert at != ctypes.c_void_p(-1).value
        yield at
        libc.shmdt(at)

    with attached() as at:
        ctypes.memmove(at, SECRET.encode(), len(SECRET))
    yield number
    with attached() as at:
        held = ctypes.string_at(at)
    libc.shmctl(number, 0, None)
    assert held.decode() == SECRET


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segment: int) -> Iterator[World]:
    outside, folders = tmp_path / "outside", tmp_path / "folders"
    outside.mkdir()
    folders.mkdir()
    (outside / "secret").write_text(SECRET)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(tempfile, "tempdir", str(folders))
    connections: list[object] = []
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"]) as victim,
    ):

        def accept() -> None:
            try:
                while True:
                    connections.append(server.accept())
            except OSError:
                pass

        threading.Thread(target=accept, daemon=True).start()
        names = {"outside": str(outside), "port": server.getsockname()[1], "victim": victim.pid, "segment": segment}
        yield World(outside, connections, names)
        assert victim.poll() is None
        victim.kill()
        server.shutdown(socket.SHUT_RDWR)
    assert not connections
    assert (outside / "secret").read_text() == SECRET
    assert [path.name for path in outside.iterdir()] == ["secret"]
    assert not list(folders.iterdir())
    assert not Path("/tmp/latentmas-planted").exists()
    assert not Path("/dev/shm/latentmas-planted").exists()
    assert not started()


def started() -> list[int]:
    """Processes that a sandbox left behind."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(sandbox.GUARD) in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def skip_without(*guarantees: str) -> None:
    """Leaves out what this platform cannot guarantee; the summary of the run says so."""
    if missing := [what for what in guarantees if what in sandbox.missing()]:
        pytest.skip(f"this platform cannot guarantee: {'; '.join(missing)}")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_do_no_harm(world: World, name: str) -> None:
    skip_without(FILES, NETWORK)
    begun = time.monotonic()
    outcome = run(HOSTILE[name].format(**world.names), limits=LIMITS)[0]
    assert not MISWRITTEN.search(outcome.errors)
    assert SECRET not in outcome.output + outcome.errors
    assert len(outcome.output) + len(outcome.errors) <= 2 * LIMITS.output
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_do_not_pass(world: World, name: str) -> None:
    assert not code(CHEATS[name], DOUBLE, LIMITS)


@pytest.mark.parametrize("program", ["def double(x): return 2 * x", "double = lambda x: x + x"])
def test_what_is_right_passes(program: str) -> None:
    assert code(program, DOUBLE, LIMITS)


@pytest.mark.skipif(sys.platform != "linux", reason="only there can everything be guaranteed")
def test_what_a_platform_cannot_guarantee_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert set(sandbox.missing()) <= {FILES, NETWORK}
    guard = tmp_path / "guard.py"
    source = sandbox.GUARD.read_text().replace("LANDLOCK_CREATE_RULESET, None", "9999, None")
    guard.write_text(source.replace("def leave_root() -> bool:", "def leave_root() -> bool:\n    return False"))
    monkeypatch.setattr(sandbox, "GUARD", guard)
    assert FILES in run("pass")[0].missing


@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="needs Linux and root")
def test_root_becomes_nobody_where_landlock_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guard = tmp_path / "guard.py"
    source = sandbox.GUARD.read_text().replace("LANDLOCK_CREATE_RULESET, None", "9999, None")
    guard.write_text(
        source.replace(
            "def _readable_by_all(path: str) -> bool:", "def _readable_by_all(path: str) -> bool:\n    return True"
        )
    )
    monkeypatch.setattr(sandbox, "GUARD", guard)
    outcome = run("import os\nprint(os.getuid())\nopen('f', 'w').write('x')")[0]
    assert (outcome.output, outcome.status, outcome.missing) == ("65534\n", 0, ())


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
@pytest.mark.parametrize(
    "call", ["time.clock_settime(time.CLOCK_REALTIME, time.time())", "os.chroot('.')", "os.setuid(1)"]
)
def test_root_is_no_longer_root(call: str) -> None:
    skip_without(NETWORK)
    assert "PermissionError" in run(f"import os, time\n{call}")[0].errors


@pytest.mark.skipif(sys.platform != "linux", reason="not all of them are there elsewhere")
@pytest.mark.parametrize(
    "call",
    [
        *("shmat(-1, 0, 0)", "shmctl(-1, 0, 0)", "semop(-1, 0, 0)", "semtimedop(-1, 0, 0, 0)", "semctl(-1, 0, 0)"),
        *("msgsnd(-1, 0, 0, 0)", "msgrcv(-1, 0, 0, 0, 0)", "msgctl(-1, 0, 0)", "mq_unlink(b'/queue')"),
    ],
)
def test_what_processes_share_by_a_number_or_a_name_is_refused(call: str) -> None:
    skip_without(NETWORK)
    said = run(f"import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nlibc.{call}\nprint(ctypes.get_errno())")[0]
    assert int(said.output) in (errno.EPERM, errno.EACCES)


@contextmanager
def descriptors(free: int) -> Iterator[None]:
    """Leaves this process no more than so many."""
    numbers = [os.dup(0) for _ in range(free + 1)]
    for number in numbers:
        os.close(number)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (numbers[-1], hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("free", [0, 3, 4, 6, 8, 15])
def test_programs_that_cannot_be_started_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = psutil.Process().num_fds()
    with descriptors(free), pytest.raises(SandboxUnavailable, match="No program can be started"):
        run("pass", "pass")
    assert psutil.Process().num_fds() <= before
    assert not list(tmp_path.iterdir())
    assert not started()


def test_a_program_ends_as_it_would_anywhere() -> None:
    assert run("print('hello')")[0][:3] == ("by itself", 0, "hello\n")
    assert run("import sys\nsys.exit(7)")[0].status == 7
    failed = run("print(1)\nraise ValueError('why')")[0]
    assert (failed.status, failed.output) == (1, "1\n")
    assert "ValueError: why" in failed.errors
    assert run("import numpy\nprint(numpy.arange(3).sum())")[0].output == "3\n"


def test_a_program_may_use_its_folder() -> None:
    program = "open('a', 'w').write('hello')\nprint(open('a').read())\nimport os\nos.remove('a')\nprint(os.listdir())"
    assert run(program)[0].output == "hello\n[]\n"


@pytest.mark.parametrize(
    ("program", "ended"),
    [
        ("while True: pass", "by a signal"),
        ("import time\ntime.sleep(60)", "out of time"),
        ("while True: print('x' * 1000)", "out of output"),
        (HOSTILE["many files"].replace("{{", "{").replace("}}", "}"), "out of disk"),
    ],
)
def test_it_is_said_what_a_program_was_out_of(program: str, ended: str) -> None:
    assert run(program, limits=Limits(seconds=2 if "sleep" in program else 60, cpu_seconds=1))[0].ended == ended


def test_programs_wait_for_one_another_so_that_none_runs_out_of_time() -> None:
    bound = max(1, (os.cpu_count() or 2) // 2)
    calls = [threading.Thread(target=run, args=("import time\ntime.sleep(0.5)",)) for _ in range(bound + 2)]
    for call in calls:
        call.start()
    most = 0
    while any(call.is_alive() for call in calls):
        most = max(most, len(started()))
        time.sleep(0.05)
    assert most == bound


def test_a_program_does_not_outlive_who_runs_it(tmp_path: Path) -> None:
    program = "import time; open('begun', 'w').close(); time.sleep(60)"
    runs = f"from langchain_latentmas.evaluation.sandbox import run; run({program!r})"
    with subprocess.Popen([sys.executable, "-c", runs], env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        try:
            wait_for(lambda: any(tmp_path.glob("*/begun")))  # it has asked the kernel by now to end with its parent
            assert started()
        finally:
            process.kill()
    wait_for(lambda: not started(), 10)


@pytest.mark.parametrize(
    ("guard", "why"),
    [("raise SystemExit('no seccomp here')", "no seccomp here"), ("raise SystemExit", "by itself")],
)
def test_a_program_that_could_not_lock_itself_in_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, guard: str, why: str
) -> None:
    (tmp_path / "guard.py").write_text(guard)
    monkeypatch.setattr(sandbox, "GUARD", tmp_path / "guard.py")
    with pytest.raises(SandboxUnavailable, match=f"could not be locked in: {why}"):
        run("print('This is not to be seen.')")


def test_a_platform_without_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(SandboxUnavailable, match="Linux and macOS"):
        run("pass")


def test_two_programs_talk() -> None:
    outcomes = run(
        "import os\nos.write(PIPES[1], b'ping')\nprint(os.read(PIPES[0], 4))",
        "import os\nprint(os.read(PIPES[0], 4))\nos.write(PIPES[1], b'pong')",
    )
    assert [outcome.output for outcome in outcomes] == ["b'pong'\n", "b'ping'\n"]
    assert all(isinstance(outcome, Outcome) for outcome in outcomes)
