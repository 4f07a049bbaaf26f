"""What every notebook begins with: settings, environment, model, text, artifacts, claims.

Libraries that greet while they are imported are silenced here, before anything of `common` imports them; their errors
still come through. `environment` silences those that speak later.
"""

import logging

for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
