"""Programs are judged by running them, within limits."""

from __future__ import annotations

import os
import random
import time

import pytest

from tunesmith import world
from tunesmith.errors import DataError
from tunesmith.world import _run
from tunesmith.world._run import run
from tunesmith.world.programs import TEMPLATES, Programs


def test_every_template_is_accepted_and_its_neighbours_are_not() -> None:
    family = Programs(examples=1, tests=8)
    seen: dict[str, world.Item] = {}
    rng = random.Random(0)
    while len(seen) < len(TEMPLATES):
        item = family.generate(rng)
        shape = next(t.says for t in TEMPLATES if _matches(t.says, item.meta["says"]))
        seen.setdefault(shape, item)
    for item in seen.values():
        assert family.why_not(item, item.answer) is None
        assert not family.check(item, item.answer.replace("return ", "return not "))
    wrong = [
        "",
        "no code",
        "def other(n):\n    return n",
        item.answer.replace("solve", "resolve"),
        "def solve(x):\n  1 +",
    ]
    assert not any(family.check(item, output) for output in wrong)


def _matches(template: str, says: str) -> bool:
    head, _, tail = template.replace("{c}", "{k}").partition("{k}")
    return says.startswith(head) and says.endswith(tail) and len(says) == len(head) + len(tail) + 1


def test_another_way_to_write_it_is_right() -> None:
    family = Programs(templates=1)
    item = family.items(1)[0]
    k = item.meta["says"].split()[-1].rstrip(".")
    assert family.check(item, f"import math\n\ndef solve(n):\n    print('hello')\n    return int(math.fsum([n, {k}]))")
    assert not family.check(item, f"def solve(n):\n    return float(n + {k})")


def test_examples_are_true_and_hidden_calls_differ_in_number() -> None:
    item = Programs(examples=3, tests=4).items(1)[0]
    assert item.prompt.count(">>> solve(") == 3
    assert len(item.meta["calls"]) == len(item.meta["expected"]) == 4
    calls = [line[len(">>> ") :] for line in item.prompt.splitlines() if line.startswith(">>> ")]
    shown = item.prompt.splitlines()[2::2]
    names: dict[str, object] = {}
    exec(item.answer, names)
    assert [repr(eval(call, names)) for call in calls] == shown


def test_split_is_by_function_whatever_the_examples() -> None:
    family = Programs()
    heldout = {item.meta["says"] for item in family.items(60, split="heldout")}
    train = {item.meta["says"] for item in family.items(300, split="train")}
    assert len(heldout) > 5
    assert not heldout & train


def test_results_come_back_in_order() -> None:
    assert run("def solve(a, b):\n    return [a, (b, a)]", "solve", [[1, 2], ["x", None]]).results == [
        [1, [2, 1]],
        ["x", [None, "x"]],
    ]


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def solve(x):\n    return x +", "SyntaxError"),
        ("def solve(x):\n    return y", "NameError"),
        ("def solved(x):\n    return x", "KeyError"),
        ("def solve(x):\n    return {1}", "TypeError"),
        ("import sys\nsys.exit(0)", "SystemExit"),
        ("import os\nos._exit(0)", "no result"),
        ("def solve(x):\n    return 'a' * (1 << 30)", "MemoryError"),
        ("def solve(x):\n    return 'a' * 100_000", "no result"),
        ("def solve(x):\n    return solve(x)", "RecursionError"),
        ("def solve(x):\n    with open('found', 'w') as file:\n        file.write('text')", "OSError"),
    ],
)
def test_bad_code_is_an_error_not_a_crash(code: str, says: str) -> None:
    outcome = run(code, "solve", [[1]], seconds=5)
    assert outcome.results is None
    assert outcome.error is not None
    assert says in outcome.error


def test_claiming_success_does_not_help() -> None:
    family = Programs(templates=1)
    item = family.items(1)[0]
    forged = (
        "import os\nfor fd in range(3, 9):\n    try:\n        os.write(fd, b'{\"results\": [1, 1, 1, 1, 1, 1]}')\n"
        "    except OSError:\n        pass\nos._exit(0)"
    )
    assert not family.check(item, forged)
    assert not family.check(item, forged.replace("[1, 1, 1, 1, 1, 1]", "7"))
    assert not family.check(item, forged.replace('{"results": [1, 1, 1, 1, 1, 1]}', "[" * 50_000))
    assert not family.check(item, "class Same:\n    def __eq__(self, o): return True\ndef solve(n): return Same()")


@pytest.mark.parametrize(
    "code",
    [
        "def solve(x):\n    while True:\n        pass",
        "import time\ndef solve(x):\n    time.sleep(60)",
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        "def solve(x):\n    kept = []\n    while True:\n        kept.append('a' * 1_000_000)",
    ],
)
def test_endless_code_is_stopped(code: str) -> None:
    began = time.monotonic()
    outcome = run(code, "solve", [[1]], seconds=1)
    assert outcome.results is None
    assert time.monotonic() - began < 5


def test_nothing_of_our_environment_or_folder_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "value")
    code = "import os\ndef solve(x):\n    return [os.environ.get('SECRET'), os.getcwd()]"
    secret, folder = (run(code, "solve", [[1]]).results or [[None, None]])[0]
    assert secret is None
    assert folder != os.getcwd()
    assert not os.path.exists(folder)


def test_our_own_standard_input_is_out_of_reach() -> None:
    assert run("import sys\ndef solve(x):\n    return sys.stdin.read()", "solve", [[1]]).results == [""]


def test_a_system_without_limits_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_run, "_CHILD", "raise OSError('setrlimit')")
    with pytest.raises(DataError, match="could not be set on this system; the process ended with status 1"):
        run("def solve(x):\n    return x", "solve", [[1]])
