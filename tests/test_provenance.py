"""What a record says of the code and the weights that made it is true of them."""

import shutil
import subprocess

import pytest
import torch
from torch import nn

from lab import provenance


def test_weights_of_another_name_or_another_buffer_have_another_digest():
    norm = nn.BatchNorm2d(2)
    digests = [provenance.weights_digest(nn.ModuleDict({name: norm})) for name in "ab"]
    norm.running_mean += 1
    digests.append(provenance.weights_digest(nn.ModuleDict({"b": norm})))
    assert len(set(digests)) == 3


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_a_record_names_the_commit_of_its_code_and_every_change_since(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "lab").mkdir(parents=True)
    sources = [source / "study.py", source / "lab/engine.py"]

    def git(*args):
        command = ["git", "-C", source, "-c", "user.name=a", "-c", "user.email=a@b", *args]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for path in sources:
        path.write_text("1")
    git("init"), git("add", "."), git("commit", "--message", "first")
    monkeypatch.setattr(provenance, "SOURCE", source)
    monkeypatch.chdir(tmp_path)  # a script runs anywhere
    found = [provenance.environment(torch.device("cpu"), torch.float32)]
    for path in sources:
        path.write_text("2")
        found.append(provenance.environment(torch.device("cpu"), torch.float32))
    assert [one["commit"] for one in found] == [git("rev-parse", "HEAD")] * 3
    assert [one["uncommitted_changes"] for one in found] == [False, True, True]
    assert len({one["source_sha256"] for one in found}) == 3
