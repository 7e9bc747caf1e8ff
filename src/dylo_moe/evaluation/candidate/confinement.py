"""Limits that a process sets on itself before it runs an answer: CPU time, memory, files, network, other processes.

The limits of ``setrlimit`` work everywhere; the seccomp filter and Landlock need Linux on x86-64 or AArch64. None of
them can be undone. Namespaces are not set here: bubblewrap makes them, started by ``Sandbox``.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Iterable

FILE_BYTES, OPEN_FILES, PROCESSES = 1 << 20, 64, 64

_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""The kernel's number of an architecture, and its column in the table of system calls."""

_REFUSED: dict[str, tuple[int | None, int | None]] = {
    # new programs and processes; clone is checked below
    "execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None),
    # other processes
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "kcmp": (312, 272), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274), "sched_setaffinity": (203, 122),
    # the network, and memory that no limit covers
    "socket": (41, 198), "shmget": (29, 194), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    # metadata of files, which Landlock does not protect
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None),
    "fchown": (93, 55), "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "futimesat": (261, None), "utimensat": (280, 88), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15), "fremovexattr": (199, 16),
    "truncate": (76, 45), "mknod": (133, None), "mknodat": (259, 33), "open_by_handle_at": (304, 265),
    # administration of the kernel
    "personality": (135, 92), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "unshare": (272, 97), "setns": (308, 268), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432),
    "fspick": (433, 433), "mount_setattr": (442, 442), "userfaultfd": (323, 282), "bpf": (321, 280),
    "perf_event_open": (298, 241), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "sethostname": (170, 161),
    "setdomainname": (171, 162), "acct": (163, 89), "quotactl": (179, 60),
    "syslog": (103, 116),
}  # fmt: skip
_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)

_KILL, _ALLOW, _ERRNO = 0x80000000, 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38
_PR_SET_PDEATHSIG, _PR_SET_KEEPCAPS, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
_CAP_DAC_READ_SEARCH = 1 << 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_READ_FILE, _READ_DIRECTORY, _EXECUTE = 1 << 2, 1 << 3, 1 << 0
_RIGHTS_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_RIGHTS_SINCE_5 = (1 << 16) - 1


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def set_limits(memory: int, cpu: int, count_processes: bool) -> None:
    """Set the resource limits of this process.

    Args:
        memory: Bytes of address space.
        cpu: Seconds of CPU time, summed over all threads.
        count_processes: Whether to limit the number of processes; not where the user has others, which count too.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if count_processes:
        resource.setrlimit(resource.RLIMIT_NPROC, (PROCESSES, PROCESSES))


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def become_user(user: int, readable: str) -> None:
    """Change from root to an ordinary user that owns nothing.

    Args:
        user: The number of the user and of its only group.
        readable: A file that must stay readable. If it is in a folder that only root can read, the process keeps the
            capability to read all files: call ``restrict_files`` first, which limits what that covers.
    """
    _prctl(_PR_SET_KEEPCAPS, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    kept = 0 if os.access(readable, os.R_OK) else _CAP_DAC_READ_SEARCH
    # effective and permitted
    if _libc().capset(struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", kept, kept, 0, 0, 0, 0)):
        raise OSError(ctypes.get_errno(), "capset")


def restrict_files(paths: Iterable[str]) -> None:
    """Allow this process to read and execute the given files and folders, and refuse every other access to files.

    Raises:
        OSError: The kernel has no Landlock, or Landlock is disabled.
    """
    abi = _system_call(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    handled = _RIGHTS_OF_ABI.get(abi, _RIGHTS_SINCE_5)
    attributes = struct.pack("=Q", handled)
    if abi >= 4:
        attributes += struct.pack("=Q", 3)  # binding and connecting TCP
    if abi >= 6:
        attributes += struct.pack("=Q", 3)  # abstract sockets and signals to processes outside
    ruleset = _system_call(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    for path in paths:
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = _EXECUTE | _READ_FILE | (_READ_DIRECTORY if os.path.isdir(path) else 0)
        rule = struct.pack("=Qi", allowed, opened)
        _system_call(_LANDLOCK_ADD, ctypes.c_int(ruleset), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(opened)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _system_call(_LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


def can_filter() -> bool:
    """Return whether the system call numbers of this machine are known."""
    return platform.system() == "Linux" and platform.machine() in _ARCHITECTURES


def filter_system_calls() -> None:
    """Refuse new processes, sockets, signals to others and all else that no answer needs; threads stay allowed.

    Raises:
        OSError: The kernel has no seccomp.
    """
    program = _program(*_ARCHITECTURES[platform.machine()])
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    filled = _Program(len(program) // 8, program)
    _prctl(_PR_SET_SECCOMP, 2, ctypes.addressof(filled))


def _program(architecture: int, column: int) -> bytes:
    """Return the filter as BPF instructions: (code, jump if true, jump if false, operand)."""
    load, equal, at_least, has_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [(load, 0, 0, 4), (equal, 1, 0, architecture), (give, 0, 0, _KILL), (load, 0, 0, 0)]
    if column == 0:  # the x32 ABI has other numbers
        steps += [(at_least, 0, 1, 0x40000000), (give, 0, 0, _ERRNO | _EPERM)]
    for number in [numbers[column] for numbers in _REFUSED.values()]:
        if number is not None:
            steps += [(equal, 0, 1, number), (give, 0, 0, _ERRNO | _EPERM)]
    # a filter cannot read the flags of clone3; refused, glibc falls back to clone
    steps += [(equal, 0, 1, _CLONE3[column]), (give, 0, 0, _ERRNO | _ENOSYS)]
    thread = [(load, 0, 0, 16), (has_bit, 0, 1, 0x10000)]
    own = [(load, 0, 0, 16), (equal, 0, 1, 0)]
    for call, test in ((_CLONE, thread), (_PRLIMIT, own)):
        steps += [(equal, 0, 4, call[column]), *test, (give, 0, 0, _ALLOW), (give, 0, 0, _ERRNO | _EPERM)]
    steps.append((give, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, *arguments: int) -> None:
    padded = [ctypes.c_ulong(number) for number in (*arguments, 0, 0, 0, 0)[:4]]
    if _libc().prctl(ctypes.c_int(option), *padded):
        raise OSError(ctypes.get_errno(), f"prctl {option}")


def _system_call(number: int, *arguments: object) -> int:
    result: int = _libc().syscall(ctypes.c_long(number), *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"system call {number}")
    return result
