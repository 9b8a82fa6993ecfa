"""Execution: verdicts that code cannot talk its way to, limits that hold, a cage with nothing of ours in it."""

import os
import resource
import shutil
import socket
import tempfile
import time

import pytest

from nanochat import execution
from nanochat.errors import UserError
from nanochat.execution import Limits

DOUBLE_TESTS = "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate([1]) == [1, 1]\n"
DOUBLE = "def double(x):\n    return x + x\n"


@pytest.fixture
def cage():
    how, reasons = execution._isolation()
    if how == "none":
        pytest.skip(f"no isolation on this machine: {reasons}")
    return how


@pytest.fixture
def no_cage(monkeypatch):
    monkeypatch.setattr(execution, "_isolation", lambda: ("none", ["namespaces: not on this machine"]))


def run(program, **limits):
    return execution.execute(program, Limits(**limits))


def judged(solution, tests=DOUBLE_TESTS, **more):
    return execution.judge(solution, tests, "double", **more)


# ---- verdicts -------------------------------------------------------------------------------------------------------


def test_a_program_that_reaches_its_end_succeeds_and_one_that_raises_fails(cage):
    good = run("import sys\nprint('out')\nprint('err', file=sys.stderr)")
    assert good.success and good.stdout == "out\n" and good.stderr == "err\n" and good.error == ""
    bad = run("print('before')\nassert 1 == 2, 'no'")
    assert not bad.success and bad.error == "AssertionError: no" and bad.stdout == "before\n"
    assert "line 2" in bad.stderr


@pytest.mark.parametrize(
    "escape",
    ["import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit", "import os; os.kill(os.getpid(), 9)"],
)
def test_leaving_before_the_asserts_is_not_a_pass_pitfall_42(cage, escape):
    assert not run(f"{escape}\nassert False").success


@pytest.mark.parametrize("escape", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_leaving_is_not_a_pass_before_the_judge_either_pitfall_42(cage, escape):
    assert not judged(f"{escape}\n{DOUBLE}").success
    in_the_call = f"def double(x):\n    {escape}\n"
    assert not judged(in_the_call).success


def test_judging_passes_right_code_and_fails_wrong_code(cage):
    assert judged(DOUBLE).success
    wrong = judged("def double(x):\n    return x * x\n")
    assert not wrong.success and wrong.error.startswith("AssertionError") is False  # [1] * [1] raises TypeError there
    assert wrong.error.startswith("TypeError")
    assert judged("def triple(x): pass").error.startswith("AttributeError")
    assert judged("def double(x:").error.startswith("SyntaxError")


FORGERIES = {
    "equal to everything": "class Yes(list):\n    def __eq__(self, other): return True\ndef double(x): return Yes()",
    "an int equal to everything": "class Yes(int):\n    def __eq__(self, o): return True\ndef double(x): return Yes(9)",
    "reports for the judge": (
        "import os\nfor fd in range(3, 64):\n    try: os.write(fd, b'{\"success\": true}')\n    except OSError: pass\n"
        "os._exit(0)"
    ),
    "frames": (
        "import sys\ndef double(x):\n    f = sys._getframe()\n    while f:\n"
        "        f.f_globals.update({'report': print, 'receive': lambda l: None}); f = f.f_back\n    return 0"
    ),
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\ndef double(x): return None",
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_verdict_cannot_be_forged_from_the_code_under_test_pitfall_42(cage, name):
    assert not judged(FORGERIES[name]).success


def test_tests_that_swallow_everything_still_see_the_death_of_the_process(cage):
    tests = "def check(candidate):\n    try:\n        candidate(1)\n    except:\n        pass\n"
    assert not judged("import os\ndef double(x): os._exit(0)", tests).success
    assert judged("def double(x): raise ValueError", tests).success


def test_plain_values_cross_unchanged_and_exceptions_keep_their_type(cage):
    values = (
        "[None, True, 1, 2.5, float('inf'), 10**5000, 'é\\ud800', b'x', (1, [2]), {1: (2,)}, {3}, frozenset({4}), 1j, "
        "range(3)]"
    )
    tests = f"""
values = {values}
got = double(values)
assert got == values + values and [type(x) for x in got] == [type(x) for x in values + values]
assert str(double(float('nan'))) == 'nan'
try:
    double(None)
except TypeError as error:
    assert 'NoneType' in str(error)
else:
    assert False
"""
    result = judged(DOUBLE, tests)
    assert result.success, result
    lazy = execution.judge("def f(n):\n    yield from range(n)", "assert list(f(3)) == [0, 1, 2]", "f")
    assert lazy.success, lazy
    assert not execution.judge("def f(): return f", "assert f() is not None and f() == f()", "f").success


def test_setup_gives_the_tests_their_helpers_but_not_the_function(cage):
    setup = "def half(x):\n    return x / 2\ndef double(x):\n    '''to do'''\n"
    assert judged(DOUBLE, "assert half(double(3)) == 3", setup=setup).success
    assert not judged("pass", "assert half(double(3)) == 3", setup=setup).success


# ---- limits ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_endless_program_is_stopped_in_time(cage):
    start = time.monotonic()
    result = run("print('here', flush=True)\nwhile True: pass", timeout=0.6)
    assert result.timed_out and not result.success and result.stdout == "here\n"
    assert time.monotonic() - start < 4
    assert judged("def double(x):\n    while True: pass", limits=Limits(timeout=0.6)).timed_out


def test_a_grandchild_does_not_outlive_the_program_pitfall_42(cage):
    token = f"nanochat-orphan-{os.getpid()}"
    orphan = (
        "import os, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)', '{token}'], start_new_session=True)\n"
    )
    assert run(orphan).success
    assert run(orphan + "while True: pass", timeout=0.8).timed_out
    for _ in range(50):
        if not any(token in line for line in command_lines()):
            return
        time.sleep(0.1)
    raise AssertionError("a grandchild is still running")


def command_lines():
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as file:
                yield file.read()
        except OSError:
            continue


def test_endless_output_does_not_grow_the_parent_pitfall_42(cage):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run("line = 'x' * 10**6\nfor _ in range(300): print(line)", output=1000, timeout=20)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert result.success and len(result.stdout) == 1000
    assert grown < 30, f"{grown:.0f} MB for 300 MB of output"


@pytest.mark.slow
def test_the_memory_flag_is_set_by_the_error_and_not_by_its_name_pitfall_42(cage):
    assert run("x = bytearray(10**9)").out_of_memory
    assert run("x = []\nwhile True: x.append('a' * 10**6 + str(len(x)))").out_of_memory
    assert run("x = []\nwhile True: x.append([len(x)])", timeout=20).out_of_memory  # small things fill it to the brim
    assert not run("raise ValueError('MemoryError')").out_of_memory
    assert not run("print('MemoryError')").out_of_memory
    assert judged("def double(x): return bytearray(10**9)").out_of_memory


def test_resource_limits_hold_pitfall_42(cage):
    program = """
import os, resource
names = ('CPU', 'AS', 'NPROC', 'FSIZE', 'NOFILE', 'CORE')
print([resource.getrlimit(getattr(resource, 'RLIMIT_' + name))[1] for name in names])
try:
    open('big', 'wb').write(bytes(3 << 20))
except OSError as error:
    print(error.strerror)
forks = 0
try:
    while True:
        if os.fork() == 0:
            import time
            time.sleep(20)
        forks += 1
except BlockingIOError:
    print(forks < 20)
"""
    result = run(program, processes=20, file_size=2 << 20, memory=300 << 20)
    limits = [11, 300 << 20, 20, 2 << 20, 128, 0]
    assert result.stdout.splitlines() == [str(limits), "File too large", "True"], result


def test_threads_and_processes_are_allowed_pitfall_42(cage):
    program = """
import multiprocessing, threading
def square(x):
    return x * x
if __name__ == '__main__':
    with multiprocessing.get_context('fork').Pool(2) as pool:
        print(pool.map(square, range(4)))
    threads = [threading.Thread(target=square, args=(i,)) for i in range(8)]
    [t.start() for t in threads], [t.join() for t in threads]
"""
    result = run(program)
    assert result.success and result.stdout == "[0, 1, 4, 9]\n", result


# ---- the cage -------------------------------------------------------------------------------------------------------


def test_nothing_of_ours_is_in_sight_pitfall_42(cage, tmp_path, monkeypatch):
    secret = tmp_path / "secret.txt"
    secret.write_text("do not read")
    monkeypatch.setenv("NANOCHAT_SECRET", "do not read")
    program = f"""
import os, posix, sys
print(sorted(os.environ))
print(os.path.exists({str(secret)!r}), os.path.exists({str(execution.SANDBOX)!r}), os.path.exists('/proc/1'))
for act in (lambda: posix.unlink({str(secret)!r}), lambda: os.mkdir('/usr/lib/x'), lambda: os.kill({os.getpid()}, 0)):
    try:
        act()
        print('done')
    except OSError as error:
        print(type(error).__name__)
print(os.listdir('.'), sys.argv, os.getcwd())
"""
    out = run(program).stdout
    assert "NANOCHAT_SECRET" not in out and "done" not in out and secret.exists(), out
    assert out.splitlines()[1] == "False False False", out
    assert out.splitlines()[-1] == "['program.py'] ['/tmp/program.py'] /tmp", out


def test_there_is_no_network_pitfall_42(cage):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it can be reached from here
        result = run(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=2)")
    assert not result.success and "OSError" in result.error or "unreachable" in result.error.lower(), result


def test_privileges_cannot_be_had_back(cage):
    program = (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "print(libc.unshare(0x10000000), libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), libc.sethostname(b'x', 1))\n"
        "try:\n    os.setuid(0 if os.getuid() else 1)\n    print('changed')\nexcept OSError:\n    print('kept')\n"
    )
    assert run(program).stdout == "-1 -1 -1\nkept\n"


def test_files_last_no_longer_than_the_call(cage):
    before = set(os.listdir(tempfile.gettempdir()))
    assert run("open('left', 'w').write('x')").success
    assert "left" not in run("import os\nprint(os.listdir('.'))").stdout
    after = {name for name in os.listdir(tempfile.gettempdir()) if name.startswith("nanochat-run-")}
    assert not after - before


@pytest.mark.slow
def test_bubblewrap_gives_the_same_cage(tmp_path):
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    secret = tmp_path / "secret"
    secret.write_text("x")
    program = f"import os\nprint(os.path.exists({str(secret)!r}), sorted(os.environ))"
    result = execution._execute(program, Limits(), "bubblewrap")
    assert result.success and result.stdout.startswith("False") and "USER" not in result.stdout, result


def test_without_isolation_code_is_refused_unless_that_was_allowed(no_cage, monkeypatch):
    with pytest.raises(UserError, match="can't isolate code.*not on this machine.*--allow-unsafe-code"):
        execution.execute("print(1)")
    monkeypatch.setenv("NANOCHAT_SECRET", "x")
    result = execution.execute("import os\nprint(sorted(os.environ), os.getcwd())", allow_unsafe=True)
    assert result.success and "NANOCHAT_SECRET" not in result.stdout and "nanochat-run-" in result.stdout
    assert not execution.execute("raise SystemExit", allow_unsafe=True).success
    assert execution.execute("while True: pass", Limits(timeout=0.5), allow_unsafe=True).timed_out
    assert execution.judge(DOUBLE, DOUBLE_TESTS, "double", allow_unsafe=True).success


def test_an_old_kernel_and_another_system_are_named(monkeypatch):
    monkeypatch.setattr(execution.platform, "release", lambda: "5.4.0-generic")
    assert "older than 5.14" in execution._missing("namespaces")
    monkeypatch.setattr(execution.sys, "platform", "darwin")
    assert execution._missing("namespaces") == "not on darwin"


@pytest.mark.slow
def test_humaneval_own_solutions_pass_and_stubs_fail(cage, shared_data):
    import pyarrow.parquet as parquet

    rows = parquet.read_table(shared_data / "tasks" / "humaneval" / "test.parquet").to_pylist()[::8]
    for row in rows:
        whole = row["prompt"] + row["canonical_solution"]
        result = execution.judge(whole, row["test"], row["entry_point"], setup=row["prompt"])
        assert result.success, (row["task_id"], result)
        stub = execution.judge(row["prompt"] + "    pass\n", row["test"], row["entry_point"], setup=row["prompt"])
        assert not stub.success, row["task_id"]
