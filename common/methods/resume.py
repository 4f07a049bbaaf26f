"""What an interrupted compression has finished, a file for each block: the next run takes it up there.

Done blocks are not computed again, only put in place, and the calibration data flows on through them as it did; so the
rest comes out the same. What the files hold is what the method makes of a block: GPTQ's codes take a byte a weight.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from common.course.checkpoint import checksums
from common.course.files import whole_file, write_whole
from common.methods.capture import Block


class Resume:
    """Finished blocks of one compression in `folder`; those of another model, text or setting are thrown away.

    put(block, tensors): change the block as an earlier run did; take(block): the tensors that `put` will want.
    """

    def __init__(
        self,
        folder: Path,
        model: nn.Module,
        windows: Tensor,
        settings: object,
        put: Callable[[Block, dict[str, Tensor]], None],
        take: Callable[[Block], dict[str, Tensor]],
        device: torch.device | str | None = None,
    ):
        self.folder, self.put, self.take, self.found = folder, put, take, 0
        made_of = repr((sorted(checksums(model, device).items()), settings, torch.__version__)).encode()
        key = {"of": hashlib.sha256(made_of + windows.numpy().tobytes()).hexdigest()}
        description = folder / "resume.json"
        if not description.exists() or json.loads(description.read_text(encoding="utf-8")) != key:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_whole(description, json.dumps(key) + "\n")

    def _file(self, block: Block) -> Path:
        return self.folder / f"block-{block.index:03}.safetensors"

    def restore(self, block: Block) -> bool:
        """Whether the block is done; then it is changed as it was."""
        if not self._file(block).exists():
            return False
        self.put(block, load_file(self._file(block)))
        self.found += 1
        return True

    def keep(self, block: Block) -> None:
        """Remember a block that has just been changed."""
        if self.found:
            print(f"Resumed at block {block.index}: an interrupted run had finished the {self.found} before it.")
            self.found = 0
        with whole_file(self._file(block)) as new:
            save_file({name: tensor.contiguous().cpu() for name, tensor in self.take(block).items()}, new)

    def finish(self) -> None:
        """All blocks are done, and the caller has them."""
        shutil.rmtree(self.folder)
