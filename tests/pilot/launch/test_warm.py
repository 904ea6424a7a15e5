"""ClientApps that are forks: processes of their own, with the parents and the lives of any other ClientApp."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
from flwr.supercore.superexec.executor import subprocess_executor

from pilot.launch import warm
from pilot.processes.ancestry import ancestors

from ...waiting import gone, until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks on Linux only")

# A stand-in for the SuperExec: starts a fork per line of its standard input, and tells its pid.
SUPEREXEC = """
import json, os, sys, time
from pilot.launch.warm import Template, show_as

template = Template.fork()
if isinstance(template, list):
    mark, what = template
    show_as([sys.executable, "flwr-clientapp", "--parent-pid", str(os.getppid())])
    with open(mark + ".new", "w") as file:
        json.dump({"pid": os.getpid(), "parent": os.getppid()}, file)
    os.rename(mark + ".new", mark)
    if what == "raise":
        raise SystemExit(3)
    time.sleep(600 if what == "stay" else 0)
else:
    for line in sys.stdin:
        print(template.start(json.loads(line)), flush=True)
"""


class SuperExec:
    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SUPEREXEC, "--parent-pid", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def start(self, mark: Path, what: str) -> psutil.Process:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps([str(mark), what]) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        until(mark.exists)
        assert json.loads(mark.read_text()) == {"pid": pid, "parent": self.process.pid}
        return psutil.Process(pid)


def test_a_fork_is_a_child_of_the_superexec_with_the_same_processes_above_it(
    tmp_path: Path,
) -> None:
    superexec = SuperExec()
    clientapp = superexec.start(tmp_path / "first", "stay")
    assert clientapp.cmdline()[:2] == [sys.executable, "flwr-clientapp"]
    above = ancestors(clientapp.pid)
    assert above is not None
    assert [process.pid for process in above] == [
        clientapp.pid,
        superexec.process.pid,
        os.getpid(),
    ]
    clientapp.kill()
    until(lambda: gone([clientapp]))
    second = superexec.start(tmp_path / "second", "stay")
    assert not psutil.pid_exists(clientapp.pid), "the SuperExec has taken leave of it"
    members = psutil.Process(superexec.process.pid).children(recursive=True)
    assert second in members and len(members) == 2
    (template,) = set(members) - {second}
    assert template.cmdline()[:2] == [sys.executable, "pilot-template"], "it is no SuperExec"
    superexec.process.kill()
    superexec.process.wait()
    until(lambda: gone([m for m in members if m != second]))
    second.kill()  # Flower's own watch over its parent is not part of this stand-in


def test_a_superexec_without_its_template_says_so(tmp_path: Path) -> None:
    superexec = SuperExec()
    first = superexec.start(tmp_path / "first", "end")
    (template,) = set(psutil.Process(superexec.process.pid).children()) - {first}
    template.kill()
    assert superexec.process.stdin is not None
    superexec.process.stdin.write(json.dumps([str(tmp_path / "second"), "end"]) + "\n")
    superexec.process.stdin.flush()
    superexec.process.wait(30)
    assert superexec.process.returncode == 1, "it raised: the caller takes Flower's own way"


def test_flower_starts_its_clientapps_by_the_template_and_all_else_as_ever(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started: list[list[str]] = []

    class Fake(warm.Template):
        works = True

        def __init__(self) -> None:
            pass

        def start(self, words: Sequence[str], *, quiet: bool = False) -> int:
            if not self.works:
                raise BrokenPipeError
            started.append([*(["quietly"] if quiet else []), *words])
            return 1

    class Popen:
        def __init__(self, words: list[str], **options: object) -> None:
            started.append(["process", *words])

    monkeypatch.setattr(subprocess_executor, "subprocess", subprocess_executor.subprocess)
    monkeypatch.setattr(subprocess, "Popen", Popen)
    template = Fake()
    template.starts("flwr-clientapp", of=subprocess_executor, tell=tmp_path / "last")
    executor = subprocess_executor.SubprocessExecutor()
    types = subprocess_executor.TaskType

    def launch(kind: str, *, quiet: bool = False) -> list[str]:
        spec = subprocess_executor.ExecutionSpec(
            task_type=types(kind),
            runtime_api_address="127.0.0.1:9",
            token="secret",
            insecure=True,
            root_certificates_path=None,
            runtime_dependency_install=False,
            parent_pid=7,
            suppress_output=quiet,
            task_id=1,
            fab_hash=None,
        )
        assert executor.launch(spec).status.name == "ACCEPTED"
        return started[-1]

    options = ["--runtime-api-address", "127.0.0.1:9", "--token", "secret", "--insecure"]
    clientapp = ["flwr-clientapp", *options, "--parent-pid", "7"]
    assert launch(types.CLIENT_APP) == clientapp
    assert (tmp_path / "last").read_text() == "1"
    assert launch(types.CLIENT_APP, quiet=True) == ["quietly", *clientapp]
    assert launch(types.SERVER_APP)[:2] == ["process", "flwr-serverapp"]
    template.works = False
    assert launch(types.CLIENT_APP) == ["process", *clientapp]


def test_the_program_is_flowers_own_by_name_and_help(tmp_path: Path) -> None:
    directory = warm.install(tmp_path / "a b" / "bin")
    assert [path.name for path in directory.iterdir()] == ["flower-superexec"]
    environment = {**os.environ, "PATH": f"{directory}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["flower-superexec", "--help"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: flower-superexec") and "--parent-pid" in done.stdout
