"""A tool that is told to stop says so in one line, and how to go on only where there is a way.

Runs that are stopped while they train are in test_resume.py.
"""

import os
import signal

import pytest
from conftest import one_error, run_seg

from lab import cli, engine, provenance


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_to_a_tool_without_a_checkpoint_speaks_of_none(capsys, name, code):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.guard(lambda: os.kill(os.getpid(), getattr(signal, name))) == code
    assert one_error(capsys) == f"error: stopped by {name}"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("flags, ending", [
    ([], "; the same command goes on from the last checkpoint"), (["--dry-run"], "")])
def test_a_signal_after_training_says_how_to_go_on_if_there_is_a_way(tiny_root, tmp_path, capsys,
                                                                     monkeypatch, flags, ending):
    monkeypatch.setattr(engine, "predict", lambda *args: os.kill(os.getpid(), signal.SIGTERM))
    assert run_seg(tiny_root, tmp_path, *flags) == 143
    assert one_error(capsys) == f"error: stopped by SIGTERM{ending}"


@pytest.mark.parametrize("script", ["data", "predict"])
def test_scripts_that_train_nothing_stop_in_one_line_too(script):
    source = (provenance.SOURCE / f"{script}.py").read_text()
    assert source.endswith("if __name__ == \"__main__\":\n    sys.exit(cli.guard(main))\n")
