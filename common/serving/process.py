"""The service as a child process, for notebooks and tests."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from common.course.settings import work_folder
from common.engines import processes


@contextmanager
def serve(model: str = "embedded", *options: str, api_key: str = "") -> Iterator[str]:
    """Serve `model` on a free port of loopback while the `with` block lasts; yields the service's URL.

    options: as `python -m common.serving` has. It ends with the block, and with this process however that ends.
    Raises EngineDied with the end of its log when it cannot start.
    """
    port = processes.free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "common.serving", "--model", model, "--port", str(port), *options]
    log = work_folder() / "logs" / f"serving-{port}.log"
    key = {"COURSE_API_KEY": api_key}
    with processes.serve_command(command, health=f"{url}/health/ready", log=log, name="The service", environment=key):
        yield url
