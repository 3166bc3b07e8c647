"""math-verify in its process: limits, threads, forks, interrupts, and what it is asked."""

import builtins
import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import reward_cases

from cppo import rewards
from cppo.rewards import combine, from_names, symbolic, symbolic_worker

NEVER_ENDS = r"10^{10^{10}}"
WITHOUT = "math_verify: needs the package math-verify: pip install 'cppo\\[math\\]'"


@pytest.fixture(autouse=True, scope="module")
def needs_math_verify():
    pytest.importorskip("math_verify", reason="the extra 'math' is not installed")


one = functools.partial(reward_cases.one, rewards.math_verify)


def in_threads(ask, *questions):
    """Ask each question in a thread of its own, all at the same time."""
    threads = [threading.Thread(target=ask, args=question) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)


# ---- limits


def test_a_comparison_that_never_ends_is_stopped_in_any_thread():
    found = []

    def ask():
        found.append(one(rf"\boxed{{{NEVER_ENDS}}}", "4", timeout=1.0))

    in_threads(ask, ())
    assert found == [0.0]
    assert one(r"\boxed{2x}", "x + x") == 1  # and the next one is answered


def test_a_ground_truth_that_never_ends_is_stopped():
    golds = [NEVER_ENDS] * 2 + ["x + x"]
    texts = [r"\boxed{y}", rf"\boxed{{{NEVER_ENDS}}}", r"\boxed{2x}"]
    found = rewards.math_verify(texts, prompts=["?"] * 3, answer=golds, timeout=1.0)
    assert found == [0.0, 1.0, 1.0]  # the second is spelled like its ground truth


def test_only_the_comparison_that_never_ends_is_lost():
    texts = [r"\boxed{2x}", rf"\boxed{{{NEVER_ENDS}}}", r"\boxed{x \cdot 2}", r"\boxed{3x}"]
    found = rewards.math_verify(texts, prompts=["?"] * 4, answer=["x + x"] * 4, timeout=2.0)
    assert found == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("golds", [["4"] * 12, list("0123456789ab")])
def test_a_batch_has_a_limit_too(golds):
    """Five comparisons may reach their limit, and those that are likely to do so come last."""
    texts = [rf"\boxed{{10^{{10^{{{n}}}}}}}" for n in range(11, 22)] + [r"\boxed{2x}"]
    began = time.monotonic()
    golds = [*golds[:-1], "x + x"]
    with pytest.warns(UserWarning, match="6 of 12 answers were not compared and have no reward"):
        found = rewards.math_verify(texts, prompts=["?"] * 12, answer=golds, timeout=0.5)
    assert sorted(map(str, found)) == ["0.0"] * 5 + ["1.0"] + ["None"] * 6
    assert found[-1] == 1.0
    assert time.monotonic() - began < 5 * (0.5 + 3)  # a new process takes a second or two


def test_a_right_answer_is_not_wrong_for_its_neighbours():
    hostile = [rf"\boxed{{(a+b+c+d)^{{{n}}} + i}}" for n in range(500, 505)]
    texts, golds = [*hostile, r"\boxed{\frac{2x+2}{2}}"], ["x + 1"] * 6
    assert rewards.math_verify(texts, answer=golds, timeout=0.5)[-1] == 1.0


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="the limit is read from Linux")
def test_memory_is_limited():
    one(r"\boxed{2x}", "x + x")
    limits = Path(f"/proc/{symbolic._worker._process.pid}/limits").read_text()
    assert f"Max address space         {symbolic_worker.MEMORY} " in limits


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "5", None, True])
def test_bad_timeouts(timeout):
    with pytest.raises(ValueError, match="math_verify: timeout must be a number > 0, got"):
        from_names([{"math_verify": {"timeout": timeout}}])


# ---- the process


def test_it_is_started_once():
    one(r"\boxed{2x}", "x + x")
    process = symbolic._worker._process
    in_threads(one, *((rf"\boxed{{{n}x + x}}", rf"{n + 1}x") for n in range(8)))
    assert symbolic._worker._process is process


LARGE_PARENT = """
import numpy
from cppo import rewards
from cppo.rewards import symbolic

held = numpy.ones(3 << 26)  # 1.5 GiB, as of a process that trains
processes = set()
for n in range(3):
    rewards.math_verify([rf"\\boxed{{{n}x + x}}"], prompts=["?"], answer=[f"{n + 1}x"])
    processes.add(symbolic._worker._process.pid)
print(len(processes))
"""


def test_the_memory_of_the_parent_is_not_the_worker_s():
    done = subprocess.run([sys.executable, "-c", LARGE_PARENT], capture_output=True, text=True)
    assert done.stdout == "1\n", done.stderr


def test_threads_get_their_own_answers():
    found = {}

    def ask(n):
        texts = [rf"\boxed{{{n}x + x}}", r"\boxed{x}"]
        found[n] = rewards.math_verify(texts, prompts=["?"] * 2, answer=[f"{n + 1}x"] * 2)

    in_threads(ask, *((n,) for n in range(1, 9)))
    assert found == {n: [1.0, 0.0] for n in range(1, 9)}


def test_a_worker_that_is_killed_is_replaced():
    one(r"\boxed{2x}", "x + x")
    symbolic._worker._process.kill()
    assert one(r"\boxed{3x}", "x + x + x") == 1


def test_a_forked_child_has_a_worker_of_its_own():
    one(r"\boxed{2x}", "x + x")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = int(one(r"\boxed{4x}", "x + 3x") != 1)
        finally:
            os._exit(status)
    assert one(r"\boxed{5x}", "2x + 3x") == 1
    assert os.waitpid(child, 0)[1] == 0


def run(script, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


ASK = r"""
    import sys
    from cppo import rewards
    from cppo.rewards import symbolic
    assert "sympy" not in sys.modules and "math_verify" not in sys.modules
    print(rewards.math_verify([r"\boxed{2x}"], prompts=["?"], answer=["x + x"]), flush=True)
    print(symbolic._worker._process.pid, flush=True)
"""


def has_ended(pid, seconds):
    for _ in range(int(seconds * 20)):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("end", ["exit", "kill", "kill at work"])
def test_the_worker_ends_with_its_parent(end):
    script = ASK
    if end == "kill":
        script += "    import time; time.sleep(600)\n"
    elif end == "kill at work":
        script += (
            rf"    rewards.math_verify([r'\boxed{{{NEVER_ENDS}}}'], answer=['4'], timeout=3)" + "\n"
        )
    parent = run(script)
    assert parent.stdout.readline() == "[1.0]\n"
    worker = int(parent.stdout.readline())
    if end != "exit":
        time.sleep(0.2)
        parent.kill()
    parent.wait(60)
    parent.stdout.close()
    assert has_ended(worker, 20)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_an_interrupt_leaves_nothing_behind():
    script = ASK + (
        r"""
    try:
        rewards.math_verify([r"\boxed{10^{10^{10}}}"], prompts=["?"], answer=["4"], timeout=300)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    print(rewards.math_verify([r"\boxed{3x}"], prompts=["?"], answer=["x + 2x"]), flush=True)
"""
    )
    parent = run(script, start_new_session=True)
    assert parent.stdout.readline() == "[1.0]\n"
    worker = int(parent.stdout.readline())
    time.sleep(0.5)
    os.killpg(parent.pid, signal.SIGINT)  # as Ctrl-C does: to the parent and to the worker
    assert parent.stdout.readline() == "interrupted\n"
    assert parent.stdout.readline() == "[1.0]\n"
    assert parent.wait(60) == 0
    parent.stdout.close()
    assert has_ended(worker, 20)


def test_a_worker_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(symbolic, "_worker", symbolic._Worker())
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(RuntimeError, match="its process does not start: ModuleNotFoundError"):
        one(r"\boxed{2x}", "x + x")


FAKE = """
import os, sys

class LatexExtractionConfig:
    def __init__(self, **options): pass

class grader: pass

def parse(text, *config, **options):
    print("noise")
    os.write(1, b"noise")
    os.write(2, b"noise")
    return [text.strip("$")]

def verify(truth, answer, **options):
    print("noise")
    assert sys.stdin.read() == ""  # what the parent says is not for it
    if "raise" in answer[0]:
        raise MemoryError
    if "exit" in answer[0]:
        os._exit(3)
    return truth == answer
"""


@pytest.fixture
def fake_math_verify(monkeypatch, tmp_path):
    """A worker with a math-verify of our own."""
    (tmp_path / "math_verify").mkdir()
    (tmp_path / "math_verify" / "__init__.py").write_text(FAKE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    worker = symbolic._Worker()
    yield worker
    worker.stop()


def test_what_libraries_print_and_raise(fake_math_verify):
    answers = ["x", "y", "raise", "x", "exit", "x"]
    verdicts = [fake_math_verify.ask(30.0, "x", answer) for answer in answers]
    assert verdicts == [True, False, False, True, None, True]


# ---- what is asked


def test_what_the_spelling_tells_is_not_asked(monkeypatch):
    asked = []
    monkeypatch.setattr(symbolic._worker, "ask", lambda *question: asked.append(question))
    texts = [r"\boxed{4}", r"\boxed{5}", r"\boxed{Evelyn}", r"\boxed{(1,2)}", "no idea", ""]
    golds = ["4", "4", r"\text{Evelyn}", "[1,2]", r"\sqrt{2}", "x"]
    found = rewards.math_verify(texts, prompts=["?"] * 6, answer=golds)
    assert found == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert asked == []


@pytest.mark.parametrize(
    ("gold", "answer", "reward"),
    [
        # what math-verify alone finds equal, and is not
        ("x^2 + 4x + 20 = 0", "x^2 + 50 = 0", 0),  # both without a solution
        ("x^2 + 4x + 20 = 0", "2x^2 + 8x + 40 = 0", 1),
        (r"\log_2(32) = 5", r"\log_3(9) = 2", 0),  # both true
        (r"10^{-20}\sqrt{2}", r"10^{-21}\sqrt{3}", 0),  # six decimals of both are 0
        (r"10^{-20}\sqrt{2}", r"10^{-20}\frac{2}{\sqrt{2}}", 1),
        (r"3\sqrt{5} \text{ ft}", r"3\sqrt{5}", 1),
        (r"3\sqrt{5} \text{ ft}", r"\sqrt{45} \text{ feet}", 1),
        (r"3\sqrt{5} \text{ ft}", r"\sqrt{45} \text{ m}", 0),
        ("10", r"10\text{ ft} \times 18\text{ ft}", 0),
        ("A^2 + 1", "1 + a^2", 0),
        ("abcd", "dcba", 0),
        (r"\pi", "3.14159265", 1),
        (r"\pi", "3.14", 0),
        ("[1,2]", r"\{1, 2\}", 0),
        ("7", "3 4", 0),  # a sum, to math-verify
        ("7", "7, 7", 0),  # a set of one
        (r"3 \pm 2", "5, 1", 1),
        (r"x + 1", r"1 + x'", 0),  # it drops primes
        (r"f'(2)", "f(2)", 0),
        (r"f^{\prime}(x)", "f'(x)", 1),
        ("9", r"9 \text{ a.m.}", 1),
        (r"9 \text{ p.m.}", r"9 \text{ a.m.}", 0),
    ],
)
def test_algebra(gold, answer, reward):
    assert one(rf"\boxed{{{answer}}}", gold) == reward


@pytest.mark.parametrize("gold", ["$$", r"\boxed{}", r"\boxed{2", "<answer> </answer>"])
def test_a_ground_truth_without_an_answer(gold):
    with pytest.raises(
        ValueError, match="math_verify: completion 1: ground truth must be an expression"
    ):
        rewards.math_verify(["1", "2"], prompts=["?"] * 2, answer=["1", gold])


# ---- without the package


@pytest.fixture
def without_math_verify(monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "math_verify":
            raise ImportError("No module named 'math_verify'")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize(
    "entry",
    [
        "math_verify",
        "math_reward",
        {"math_verify": {"timeout": 2}},
        {"length": {"accuracy": "math_verify"}},
        {"cosine_length": {"accuracy": "math_verify"}},
    ],
)
def test_it_is_refused_where_it_is_named(entry, without_math_verify):
    with pytest.raises(ImportError, match="needs the package math-verify: pip install 'cppo\\[ma"):
        from_names(["boxed", entry])


def test_it_is_refused_where_it_is_combined_or_called(without_math_verify):
    with pytest.raises(ImportError, match=WITHOUT):
        combine({"math_verify": 1.0, "boxed": 1.0})
    with pytest.raises(ImportError, match=WITHOUT):
        one("1", "1")
    assert from_names(["boxed", "gsm8k_reward"])[1] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("left", "right"), [("(", ")"), ("[", "]"), (r"\frac{1}{", "}"), ("x^{", "}")]
)
def test_deep_nesting_is_not_parsed(left, right):
    for depth in (13, 600):
        began = time.monotonic()
        assert one(rf"\boxed{{{left * depth}2{right * depth}}}", "5") == 0
        assert time.monotonic() - began < 1
    assert one(rf"\boxed{{{'(' * 6}x+1{')' * 6}}}", "1+x") == 1


@pytest.mark.parametrize("text", ["|x" * 200, "(a+b+c+d)^{500} + i", r"\sin^{1000}(x+y+z+1)"])
def test_what_algebra_cannot_do_is_over_soon(text):
    one(r"\boxed{2x}", "x + x")  # starts the worker
    began = time.monotonic()
    assert one(rf"\boxed{{{text}}}", "x + 1") == 0
    assert time.monotonic() - began < 3
