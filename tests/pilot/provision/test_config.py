"""CONFIG.toml: the example is read whole; every mistake is one sentence before anything starts."""

import re
from pathlib import Path

import pytest

from pilot.errors import ConfigError
from pilot.provision.config import open_source, read_config
from pilot.provision.policy import Limits
from pilot.rules.energy import PowerModel
from pilot.rules.thresholds import Thresholds

from .kit import service

ROOT = Path(__file__).resolve().parents[3]
EXAMPLES = sorted((ROOT / "configs" / "provision").glob("*.toml"))
SMALL = """
run = "r"
[signals.s]
kind = "calendar"
windows = ["22:00-06:00"]
[clients.a]
signal = "s"
start = ["true"]
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_read_and_their_signals_opened(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in re.findall(r"\b[A-Z][A-Z_]+_(?:TOKEN|USER|PASSWORD)\b", path.read_text()):
        monkeypatch.setenv(name, "x")
    config = read_config(path)
    assert config.clients
    for name, options in config.signals.items():
        open_source(options, name, 0.0)


def test_a_configuration_becomes_thresholds_limits_and_power(tmp_path: Path) -> None:
    text = """
    run = "d20"
    [limits]
    max-clients = 2
    grams-per-hour = 900
    [signals.west]
    kind = "file"
    file = "west.txt"
    [defaults]
    signal = "west"
    start-below = 100
    start = ["true"]
    [clients.a]
    drain-above = 150
    pue = 1.2
    training-w = 5000
    [clients.b]
    min-on = 900
    hold = 60
    """
    (tmp_path / "c.toml").write_text(text)
    config = read_config(tmp_path / "c.toml")
    assert config.limits == Limits(max_clients=2, grams_per_hour=900.0)
    a, b = config.clients["a"], config.clients["b"]
    assert a.thresholds == Thresholds(start=100.0, drain=150.0, hold_s=600.0)
    assert b.thresholds == Thresholds(start=100.0, drain=100.0, hold_s=60.0, min_on_s=900.0)
    assert a.power == PowerModel(0.0, 5000.0, 1.2)
    assert vars(config.signals["west"])["file"] == str(tmp_path / "west.txt")
    (tmp_path / "c.toml").write_text(SMALL)
    calendar = read_config(tmp_path / "c.toml").clients["a"].thresholds
    assert calendar == Thresholds(start=1.0, drain=1.0, rising=True, hold_s=0.0)


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('run = "r"', "", "needs the key run"),
        ('run = "r"', 'run = "../r"', "must start with a letter or digit"),
        ('run = "r"', 'runs = "r"', 'has no key "runs": did you mean "run"'),
        ('run = "r"', 'run = "r"\nevery = 0', "every is 0: it must be at least 0.05"),
        ('run = "r"', 'run = "r"\nevery = "5"', "every must be a number, not '5'"),
        ('run = "r"', "run = ", "is not TOML"),
        ("[clients.a]", "[clients]\na = 1\n[defaults]", r"\[clients.a\] must be a table"),
        ('kind = "calendar"', 'kind = "sun"', r"\[signals.s\] needs a kind: trace, file, calendar"),
        ('windows = ["22:00-06:00"]', "", r"\[signals.s\] needs the key windows"),
        ('windows = ["22:00-06:00"]', "windows = [1]", "windows must be a list of strings"),
        ('signal = "s"', "", "needs the key signal"),
        ('signal = "s"', 'signal = "t"', r'signal is "t", but there is no \[signals.t\]'),
        ('start = ["true"]', "", "needs the key start"),
        (
            'start = ["true"]',
            'start = ["x"]\nhook = "ssh"',
            "one of subprocess, command is possible",
        ),
        ('start = ["true"]', 'start = ["x"]\nhook = "command"', "needs the key stop"),
        ('start = ["true"]', 'start = ["x"]\nstop = ["x"]', 'belong to hook = "command"'),
        ('start = ["true"]', 'start = ["x"]\nstart-below = 1\nstart-above = 1', "needs either"),
        ('start = ["true"]', 'start = ["x"]\nstart-below = 9\ndrain-above = 8', "at the same time"),
        ('start = ["true"]', 'start = ["x"]\nstart-below = 9\ndrain-below = 8', "goes with"),
        ('start = ["true"]', 'start = ["x"]\nidle-w = -1', "must be at least 0"),
        ('start = ["true"]', 'start = ["x"]\nhold = nan', "must be a finite number"),
        ("[clients.a]", "[limits]\nmin-clients = 2\n[clients.a]", "more than there may be clients"),
    ],
)
def test_a_mistake_is_one_sentence(old: str, new: str, why: str, tmp_path: Path) -> None:
    assert old in SMALL
    (tmp_path / "c.toml").write_text(SMALL.replace(old, new))
    with pytest.raises(ConfigError, match=why) as raised:
        read_config(tmp_path / "c.toml")
    assert "\n" not in str(raised.value) or "TOML" in str(raised.value)


def test_a_signal_without_thresholds_needs_them(tmp_path: Path) -> None:
    text = SMALL.replace('kind = "calendar"', 'kind = "file"\nfile = "x"')
    (tmp_path / "c.toml").write_text(text.replace('windows = ["22:00-06:00"]', ""))
    with pytest.raises(ConfigError, match="needs either start-below or start-above"):
        read_config(tmp_path / "c.toml")
    with pytest.raises(ConfigError, match=r"cannot read .*none: No such file"):
        read_config(tmp_path / "none")


def test_check_says_what_signals_are_and_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pilot.cli import main

    with service() as stand_in:
        stand_in.serve("/microgrids/a", {"grid_signals": {"mci": 41.5}})
        text = f'run = "r"\n[signals.s]\nkind = "vessim"\nmicrogrid = "a"\nurl = "{stand_in.url}"\n'
        client = '[clients.a]\nsignal = "s"\nstart-below = 100\nstart = ["touch", "started"]\n'
        (tmp_path / "c.toml").write_text(text + client)
        assert main(["provision", str(tmp_path / "c.toml"), "--check"]) == 0
        assert capsys.readouterr().out == "run r: clients a\nsignal s: 41.5 g/kWh\n"
        stand_in.serve("/microgrids/a", {}, status=404)
        assert main(["provision", str(tmp_path / "c.toml"), "--check"]) == 1
    assert "signal s is away: 127.0.0.1:" in capsys.readouterr().err
    # without Redis nothing could be drained
    assert main(["provision", str(tmp_path / "c.toml")]) == 2
    assert (
        "error: no Redis is known here: set PILOT_REDIS_URL to the run's Redis"
        in capsys.readouterr().err
    )
