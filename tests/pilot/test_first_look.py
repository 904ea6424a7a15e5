"""`pilot up` and `pilot join` look at their machine first."""

import pytest

from pilot import doctor
from pilot.commands.first_look import first_look
from pilot.doctor.finding import fix, ok, unknown


def test_what_must_be_done_is_said_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [ok("Python", "3.11"), fix("disk", "1 GB free", "make room"), unknown("clock", "no")]
    asked = []
    monkeypatch.setattr(doctor, "quick_checks", lambda **given: asked.append(given) or found)
    first_look()
    assert asked == [{"url": ""}]
    assert capsys.readouterr().err == "warning: disk: 1 GB free: make room\n"


def test_of_a_machine_that_is_well_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    first_look()
    assert "Python" not in capsys.readouterr().err
