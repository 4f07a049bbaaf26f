"""The folder of the embedded model: made once, also where two labs are started at the same time."""

import multiprocessing
import time

import torch
from safetensors.torch import save_file

from common.course import artifacts, embedded


def test_two_processes_that_ask_at_once_get_one_whole_model(tmp_path, monkeypatch):
    def unpack(source, path, spec):
        save_file({"a": torch.ones(4)}, path / "model-00001-of-00002.safetensors")
        time.sleep(0.5)  # what the other process would take for the whole
        save_file({"b": torch.ones(4)}, path / "model-00002-of-00002.safetensors")
        with (tmp_path / "made").open("a") as log:
            log.write("once\n")

    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    monkeypatch.setattr(embedded, "_unpack", unpack)
    monkeypatch.setattr(embedded, "data_file", lambda *_: None)
    forked = multiprocessing.get_context("fork")  # the two see what is replaced here
    together = forked.Barrier(2)

    def ask():
        together.wait()
        assert len(list(embedded.embedded_folder("embedded-short").glob("*.safetensors"))) == 2

    processes = [forked.Process(target=ask) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "made").read_text() == "once\n"
    artifacts.load(tmp_path / "models" / "embedded-short")
