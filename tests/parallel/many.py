"""Several jobs in one start of the processes, each in a folder of its own: starting costs more than the jobs."""

from safetensors.torch import save_file

from common.parallel import calibrate, distil
from common.parallel.collective import folder_given, together


def main() -> None:
    with together(folder_given()) as (jobs, device):
        for name, job in jobs.items():
            folder = folder_given() / name
            if "config" in job:
                found = calibrate.calibrate(job, device, folder)
                if device.index in (None, 0):
                    save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / "found.safetensors")
            else:
                distil.train(distil.Plan(**job), device, folder)


if __name__ == "__main__":
    main()
