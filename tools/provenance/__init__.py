"""What produced a figure: fingerprints of the code behind it, and the ledger of what waits to be recorded anew.

A fingerprint covers what can change a number: the syntax tree of the functions, classes and constants that a notebook's
cells reach, wherever they stand, and the values of `profiles.toml` that they name. It does not cover comments,
docstrings, layout, annotations, where a definition stands, what its module is called, or the words of an exception or a
print. Everything that is reached counts, the recorder and the checks too; when in doubt, the whole module does.

    python -m tools.provenance            what is stale and which edit made it so, and what waits
"""

from tools.provenance import ledger
from tools.provenance.fingerprint import UNKNOWN, changed_cells, code_of, fingerprint, stamp
from tools.provenance.ledger import stale
from tools.provenance.reach import code_cells

__all__ = ["UNKNOWN", "changed_cells", "code_cells", "code_of", "fingerprint", "ledger", "stale", "stamp"]
