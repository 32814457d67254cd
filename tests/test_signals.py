"""A tool that is told to stop says so in one line, and how to go on only where there is a way.

Runs that are stopped while they train are in test_resume.py.
"""

import os
import signal

import pytest
import torch
from conftest import one_error, run_seg

from lab import cli, engine, guard, provenance
from lab.files import BadInput


@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_to_a_tool_without_a_checkpoint_speaks_of_none(capsys, name, code):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.guard(lambda: os.kill(os.getpid(), getattr(signal, name))) == code
    assert one_error(capsys) == f"error: stopped by {name}"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_on_the_way_out_hides_nothing(capsys, monkeypatch):
    """As a launcher sends it to all others once one of its processes has ended."""
    stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    def main(error, before_the_end):
        try:
            raise error
        finally:
            before_the_end()

    with monkeypatch.context() as patch:
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer")
        assert cli.guard(lambda: main(gone, stop)) == 1
        assert one_error(capsys).startswith("error: another process of the group has ended")
    monkeypatch.setattr(guard, "process", lambda: stop() or "")  # while the message is made
    assert cli.guard(lambda: main(BadInput("--seed: no"), lambda: None)) == 2
    assert one_error(capsys) == "error: --seed: no"


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
