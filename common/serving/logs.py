"""The service's log: one JSON object a line, so that programs can read it. Requests are logged without their text."""

import json
import logging


class JsonFormatter(logging.Formatter):
    """time, level, message, the fields of `extra={"fields": {...}}`, and the traceback of an exception."""

    def format(self, record: logging.LogRecord) -> str:
        line = {"time": self.formatTime(record), "level": record.levelname, "message": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def configure() -> None:
    """Requests from INFO on, of other libraries warnings only; to standard error."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("common.serving").setLevel(logging.INFO)
