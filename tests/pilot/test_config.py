"""Run configuration: every mistake is named before anything starts, and no credential travels."""

import dataclasses
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pilot.config import DEFAULTS, AutoFloat, RunConfig
from pilot.errors import ConfigError
from pilot.overrides import load_run_config
from pilot.redis_url import check_redis_url, redact_url, without_credentials

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {f.name.replace("_", "-"): f for f in dataclasses.fields(RunConfig)}
WRONG_TYPES: dict[Any, list[Any]] = {
    bool: [1, "true", None],
    int: [1.5, "1", True, None],
    float: ["0.1", True, None],
    str: [1, None, b"x"],
    AutoFloat: ["0.1", "Auto", "", True, None],
}


def config(**values: Any) -> RunConfig:
    return RunConfig.from_mapping({k.replace("_", "-"): v for k, v in values.items()})


# -- keys ----------------------------------------------------------------------------------------


def test_pyproject_holds_every_key_with_its_default_and_its_sentence() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert table == DEFAULTS
    assert {k: type(v) for k, v in table.items()} == {k: type(v) for k, v in DEFAULTS.items()}
    section = text.partition("[tool.flwr.app.config]\n")[2].partition("\n\n")[0]
    comments = dict(re.findall(r"^([a-z0-9-]+) = .*?  +# (.*)$", section, flags=re.MULTILINE))
    assert comments == {key: f.metadata["help"] for key, f in FIELDS.items()}


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda p: p.name)
def test_configuration_files_of_the_repository_are_valid(path: Path) -> None:
    RunConfig.from_mapping(load_run_config([str(path)]))


def test_every_default_is_within_its_own_limits() -> None:
    assert RunConfig.from_mapping(DEFAULTS) == RunConfig()
    assert RunConfig.from_mapping(DEFAULTS).to_mapping() == DEFAULTS


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [("dept", "depth"), ("lr_", "lr"), ("total_batch_size", "total-batch-size"), ("zzzzz", None)],
)
def test_unknown_key_is_named_with_a_suggestion_and_all_valid_keys(
    key: str, suggestion: str | None
) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.from_mapping({key: 1})
    message = str(caught.value)
    assert f'unknown run-config key "{key}"' in message and "warmdown-ratio" in message
    assert (f'did you mean "{suggestion}"?' in message) == (suggestion is not None)


@pytest.mark.parametrize("key", FIELDS)
def test_mistyped_value_is_refused_by_name(key: str) -> None:
    for value in WRONG_TYPES[FIELDS[key].type]:
        with pytest.raises(ConfigError, match=rf"\b{key}="):
            RunConfig.from_mapping({key: value})


@pytest.mark.parametrize("key", FIELDS)
def test_value_beyond_its_limits_is_refused_by_name(key: str) -> None:
    declared = FIELDS[key]
    low, high = declared.metadata["low"], declared.metadata["high"]
    outside = [low - 1] if low is not None else []
    outside += [high + 1] if high is not None else []
    outside += ["no such choice"] if declared.metadata["choices"] else []
    for value in outside:
        with pytest.raises(ConfigError, match=rf"\b{key}="):
            RunConfig.from_mapping({key: value})
    assert outside or declared.type in (str, bool), "every number has a limit"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)])
def test_number_that_is_not_finite_is_refused(value: float) -> None:
    for key in ("lr", "round-max-duration"):
        with pytest.raises(ConfigError, match=key):
            RunConfig.from_mapping({key: value})


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"device": "cpu"}, 'needs NVIDIA GPUs, and device is "cpu"'),
        ({"vocab_size": 50257}, "vocab-size that 16 divides, not 50257"),
        ({"sequence_len": 1000, "total_batch_size": 8000}, "sequence-len that 16 divides"),
    ],
)
def test_fp8_that_cannot_work_anywhere_is_refused(values: dict[str, Any], words: str) -> None:
    assert config(fp8=True, device="cuda").training_keys()["fp8"] is True
    with pytest.raises(ConfigError, match=words):
        config(fp8=True, **values)
    config(**values)


def test_whole_number_that_64_bits_do_not_hold_is_refused() -> None:
    assert config(seed=2**63 - 1).seed == 2**63 - 1
    with pytest.raises(ConfigError, match="seed=9223372036854775808 must fit into 64 bits"):
        config(seed=2**63)


def test_whole_number_is_taken_for_a_float_and_becomes_one() -> None:
    assert type(config(round_min_duration=5).round_min_duration) is float
    assert config(lr=1).training_keys() == config(lr=1.0).training_keys()


def test_a_number_that_the_program_may_choose_is_a_number_or_auto() -> None:
    assert config().outer_momentum == "auto"
    found = config(outer_lr="auto", outer_momentum=0)
    assert (found.outer_lr, found.outer_momentum) == ("auto", 0.0)
    assert type(found.outer_momentum) is float
    sentence = "run-config key outer-lr='often' must be a number or \"auto\""
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        config(outer_lr="often")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"total_batch_size": 3000, "sequence_len": 2048}, "choose 2048"),
        ({"total_batch_size": 512, "sequence_len": 2048}, "choose 2048"),
        ({"round_min_duration": 10.0, "round_max_duration": 9.0}, "longer than"),
        ({"target_param_data_ratio": 0.0}, "total-tokens or target-param-data-ratio"),
        ({"window_pattern": "SSX"}, "letters S and L"),
        ({"run_name": "../up"}, "run-name"),
        ({"run_name": ".hidden"}, "run-name"),
        ({"run_name": "a:b"}, "run-name"),
        ({"run_name": "a" * 101}, "run-name"),
        ({"outer_optimizer": "adam"}, 'outer-lr "auto" is not known for adam'),
        ({"outer_optimizer": "adam", "outer_lr": 1e-3, "outer_momentum": 1.0}, "outer-momentum"),
        ({"wire_up": "sparse", "aggregation": "median"}, 'wire-up="int4"'),
        ({"wire_up": "sparse", "aggregation": "trimmed-mean"}, 'aggregation="mean"'),
    ],
)
def test_keys_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        config(**values)


def test_training_keys_leave_out_what_does_not_shape_the_model() -> None:
    same = config(run_name="x", redis_url="redis://h", client_processes=2, wandb_mode="disabled")
    assert same.training_keys() == RunConfig().training_keys()
    assert config(seed=1).training_keys() != RunConfig().training_keys()
    assert config(quorum=1).training_keys() != RunConfig().training_keys()


# -- files and overrides -------------------------------------------------------------------------


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    one, two = tmp_path / "one.toml", tmp_path / "two.toml"
    one.write_text("depth = 2\nlr = 0.1\nsource = 'builtin'\n")
    two.write_text("lr = 0.2\n")
    merged = load_run_config([str(one), "seed=7 depth=3", str(two), "seed=8"])
    assert merged == {"depth": 3, "lr": 0.2, "source": "builtin", "seed": 8}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lr=0.0005", {"lr": 0.0005}),
        ("  lr = 1e-3   depth=4 ", {"lr": 1e-3, "depth": 4}),
        ("source='a b' run-name=\"x\"", {"source": "a b", "run-name": "x"}),
        ('source="a\\"b=c"', {"source": 'a"b=c'}),
        ("redis-url='unix:///tmp/r.sock?db=1'", {"redis-url": "unix:///tmp/r.sock?db=1"}),
        ("total-tokens=1_000_000", {"total-tokens": 1_000_000}),
        ("", {}),
    ],
)
def test_overrides_are_toml_values_separated_by_spaces(text: str, expected: object) -> None:
    assert load_run_config([text]) == expected


@pytest.mark.parametrize("text", ["lr", "lr=", "=1", "lr=0.1,depth=2", "source=builtin", "'lr=1'"])
def test_text_that_is_not_key_value_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--run-config"):
        load_run_config([text])


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot read"), (b"lr = ", "not TOML"), (b"\xff", "not TOML"), (b"[a]\nb=1", "table")],
)
def test_bad_file_is_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "x.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_run_config([str(path)])
    assert str(path) in str(caught.value)


# -- the Redis URL -------------------------------------------------------------------------------

GOOD_URLS = {
    "redis://h": "redis://h",
    "redis://h:6379/0": "redis://h:6379/0",
    "redis://[::1]:6379/0?protocol=3": "redis://[::1]:6379/0?protocol=3",
    "redis://:hunter2@h:6379/0": "redis://h:6379/0",
    "rediss://bob:hunter2@h/1": "rediss://h/1",
    "redis://bob:hun%40ter2@h": "redis://h",
    "redis://bob:password=hunter2@h": "redis://h",
    "redis://bob:x&password=hunter2@h": "redis://h",
    "redis://h/0?password=hunter2&protocol=3": "redis://h/0?protocol=3",
    "redis://h/0?protocol=3&username=bob&password=hunter2@x": "redis://h/0?protocol=3",
    "rediss://h?ssl_password=hunter2": "rediss://h",
    "unix:///tmp/r.sock": "unix:///tmp/r.sock",
    "unix:///tmp/a@b/r.sock?db=2": "unix:///tmp/a@b/r.sock?db=2",
    "unix://bob:hunter2@/tmp/r.sock?db=2": "unix:///tmp/r.sock?db=2",
    "unix:///tmp/r.sock?password=hunter2": "unix:///tmp/r.sock",
}
BAD_URLS = [
    "",
    "h:6379",
    "bob:hunter2@h:6379",
    "http://bob:hunter2@h",
    "redis://bob:hun/hunter2@h:6379",
    "redis://bob:hun?hunter2@h:6379",
    "redis://bob:12/hunter2@h:6379",
    "redis://bob:12?hunter2@h:6379",
    "redis://bob:12#hunter2@h:6379",
    "redis://bob@x:12/hunter2@h",
    "redis://:hunter2@[::1",
    "redis://:hunter2@h:port",
    "redis://:hunter2@h:99999",
]


@pytest.mark.parametrize(("url", "bare"), GOOD_URLS.items())
def test_credentials_are_hidden_in_logs_and_cut_from_messages(url: str, bare: str) -> None:
    check_redis_url(url, "redis-url")
    assert without_credentials(url) == bare
    assert without_credentials(bare) == bare == redact_url(bare)
    assert "hunter2" not in redact_url(url) and "bob" not in redact_url(url)


@pytest.mark.parametrize("url", BAD_URLS)
def test_malformed_url_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="PILOT_REDIS_URL") as caught:
        check_redis_url(url, "PILOT_REDIS_URL")
    assert "hunter2" not in str(caught.value) and "bob" not in str(caught.value)


@pytest.mark.parametrize(("url", "bare"), GOOD_URLS.items())
def test_redis_url_of_the_configuration_may_not_hold_credentials(url: str, bare: str) -> None:
    assert config(redis_url=bare).redis_url == bare
    if url != bare:
        with pytest.raises(ConfigError, match="PILOT_REDIS_URL") as caught:
            config(redis_url=url)
        assert "hunter2" not in str(caught.value)


@given(
    scheme=st.sampled_from(["redis://", "rediss://"]),
    before=st.text(alphabet="ab/?#:@&=%[]", max_size=6),
    after=st.text(alphabet="ab/?#:@&=%[]", max_size=6),
)
def test_no_password_of_any_characters_is_ever_shown(scheme: str, before: str, after: str) -> None:
    url = f"{scheme}user:{before}SECRET{after}@host:6379/0"
    assert "SECRET" not in redact_url(url)
    assert "SECRET" not in without_credentials(url)
    with pytest.raises(ConfigError) as caught:
        config(redis_url=url)
    assert "SECRET" not in str(caught.value)
