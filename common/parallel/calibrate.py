"""GPTQ and pruning on several processes: each reads its share of the calibration windows, Hessians are added up.

    torchrun --nproc-per-node 2 -m common.parallel.calibrate FOLDER        (`launch` does it)

The walker and the methods are those of one process. What they gather are sums over tokens, so one all-reduce a stage
makes them whole; the column loop, in which rows do not influence each other, is shared out by rows.
"""

import torch
from safetensors.torch import load_file, save_file

from common.course.assets import load_model
from common.measure.evaluation import evaluate
from common.methods.pruning import PruneConfig, prune_model
from common.methods.quantization import QuantizeConfig, gptq, gptq_model
from common.parallel.collective import add_up, by_rows, clock, folder_given, mine, peaks, together, write_result


def calibrate(job: dict, device: torch.device, folder) -> dict[str, torch.Tensor]:
    """The job's method on this process's windows; returns codes (GPTQ) or masks (pruning) by layer name.

    Where the folder's windows come with `tests`, the result has the perplexity on them.
    """
    given = load_file(folder / "windows.safetensors")
    windows = mine(given["windows"])
    model = load_model(job["model"], getattr(torch, job["dtype"]), device if job["on_device"] else "cpu")
    options = {"device": device, "batch_size": job["batch_size"], "reduce": add_up}
    start = clock(device)
    if "bits" in job["config"]:
        made = gptq_model(model, windows, QuantizeConfig(**job["config"]), quantize=by_rows(gptq), **options)
        found = {name: quantized.codes for name, quantized in made.items()}
    else:
        found = prune_model(model, windows, PruneConfig(**job["config"]), **options)
    seconds = clock(device) - start
    used = peaks()
    quality = evaluate(model.to(device), given["tests"]) if "tests" in given else None
    perplexity = quality.perplexity if quality else None
    write_result(folder, seconds=seconds, peak_bytes=used, windows=len(windows), perplexity=perplexity)
    return found


def main() -> None:
    folder = folder_given()
    with together(folder) as (job, device):
        found = calibrate(job, device, folder)
        if torch.distributed.get_rank() == 0:
            save_file({name: tensor.cpu().contiguous() for name, tensor in found.items()}, folder / "found.safetensors")


if __name__ == "__main__":
    main()
