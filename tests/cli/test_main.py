"""The program itself: help, usage, speed, what it does not import, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache import __version__
from kdcache.cli.main import app
from kdcache.cli.output import out
from tests.cli.commands import kdcache
from tests.cli.conftest import FinishedRun

HEAVY = ("torch", "transformers", "accelerate", "onnxruntime", "datasets", "pyarrow", "zarr", "pydantic", "rich.table")
COMMANDS = [
    *(
        ("init",),
        ("cofinetune",),
        ("plan",),
        ("dump-teachers",),
        ("audit",),
        ("weigh",),
        ("distill",),
        ("run",),
        ("evaluate",),
        ("report",),
        ("env",),
    ),
    *(("methods",), ("augment",), ("sweep",)),
    *(("cache", "info"), ("cache", "verify"), ("pipelines", "ls"), ("pipelines", "cp"), ("pipelines", "validate")),
    *(("pipelines", "prepare"), ("remote", "check")),
    *(("cache", "push"), ("cache", "pull"), ("cache", "ls"), ("cache", "rm"), ("cache", "gc"), ("cache", "status")),
    *(("cache", "extend"), ("cache", "diff"), ("cache", "export"), ("cache", "import"), ("export",)),
]


def imported(*arguments: object) -> tuple[int, set[str]]:
    """How many modules a ``kdcache`` process has imported when it ends, and which of the heavy ones.

    Imports are what takes time before a command starts. Their number does not depend on what else the machine does.
    """
    code = f"""\
import sys
from kdcache.cli.main import main
try:
    main({[str(argument) for argument in arguments]!r})
finally:
    print(len(sys.modules), *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    number, *heavy = done.stderr.split()
    return int(number), set(heavy)


def test_help_imports_little() -> None:
    number, heavy = imported("--help")
    assert heavy == set()
    assert number < 300  # 245 when this was written, 0.18 seconds of an idle core


def test_cache_info_imports_neither_torch_nor_the_readers_of_data(finished: FinishedRun) -> None:
    number, heavy = imported("cache", "info", finished.root / "cache")
    assert heavy <= {"pydantic"}
    assert number < 500  # 437, 0.4 seconds


def test_help_lists_every_command() -> None:
    said = kdcache("--help")
    assert said.code == 0
    for name in (
        "init",
        "cofinetune",
        "plan",
        "dump-teachers",
        "audit",
        "weigh",
        "distill",
        "sweep",
        "augment",
        "run",
        "evaluate",
        "export",
        "report",
        "cache",
        "pipelines",
        "methods",
        "env",
    ):
        assert f"\n  {name}" in said.out
    assert "Exit codes" in said.out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_an_example(command: tuple[str, ...]) -> None:
    said = kdcache(*command, "--help")
    assert said.code == 0
    assert f"Example: kdcache {' '.join(command)}" in said.out


def test_no_command_is_left_out_of_the_list() -> None:
    named = {(command.name,) for command in app.registered_commands}
    for group in app.registered_groups:
        assert group.typer_instance is not None
        named |= {(group.name, command.name) for command in group.typer_instance.registered_commands}
    assert named == set(COMMANDS)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("cache",),
        ("pipelines",),
        ("remote",),
        ("nonsense",),
        ("run",),
        ("run", "x.toml", "--nonsense"),
        ("evaluate", "."),
    ],
    ids=str,
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    assert kdcache(*arguments).code == 2


def test_version() -> None:
    assert kdcache("--version").out == f"{__version__}\n"


def test_env_as_json() -> None:
    said = kdcache("env", "--json")
    document = json.loads(said.out)
    assert said.code == 0
    assert document["kdcache"] == __version__
    assert document["versions"]["torch"].startswith("2.")
    assert document["home"] == os.environ["KDCACHE_HOME"]
    assert "CPUExecutionProvider" in document["onnxruntime"]
    assert document["devices"][-1].startswith("cpu")
    assert not said.err


def test_the_mode_of_a_command_ends_with_it() -> None:
    assert kdcache("env", "--json").code == 0
    assert (out.json, out.quiet) == (False, False)  # for what the same Python program does next


def test_env_for_humans() -> None:
    said = kdcache("env")
    assert said.out.startswith("kdcache ")
    assert "  torch " in said.out


def test_ctrl_c_leaves_with_130_and_says_how_to_continue(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    os.mkfifo(recipe)  # reading it waits for a writer
    # a suite that runs in the background ignores SIGINT, and children inherit that
    start = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from kdcache.cli.main import main; main()"
    )
    command = [sys.executable, "-c", start, "pipelines", "validate", str(recipe)]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        writer = os.open(recipe, os.O_WRONLY)  # opens once the command is reading
        child.send_signal(signal.SIGINT)
        _, said = child.communicate(timeout=240)
        os.close(writer)
    finally:
        child.kill()
    assert child.returncode == 130
    assert said == f"error: interrupted\nhint: Continue with the same command: kdcache pipelines validate {recipe}\n"


def completions(shell: str, *words: str) -> str:
    """What the program offers a shell after ``words``, the last of which is begun."""
    environment = {
        **os.environ,
        "_KDCACHE_COMPLETE": f"complete_{shell}",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_TYPER_COMPLETE_ARGS": " ".join(words),
    }
    code = "from kdcache.cli.main import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    return done.stdout


def test_the_shell_completes_commands_and_options() -> None:
    assert {"cofinetune", "init"} <= set(completions("bash", "kdcache", "").split())
    assert completions("bash", "kdcache", "pipelines", "val").split() == ["validate"]
    assert "--teacher" in completions("bash", "kdcache", "init", "--t").split()


def test_install_completion_writes_the_script_of_the_shell(tmp_path: Path) -> None:
    environment = {**os.environ, "HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    code = "import sys; from kdcache.cli.main import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--install-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "bash completion installed in" in done.stdout
    script = tmp_path / ".bash_completions" / "kdcache.sh"
    assert "_KDCACHE_COMPLETE=complete_bash" in script.read_text()
    assert str(script) in (tmp_path / ".bashrc").read_text()
