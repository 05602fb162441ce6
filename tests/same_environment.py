"""How the runner was started does not matter to the tests: importing this leaves them the same environment everywhere.

What stays is what finds programs and files, and what chooses hardware.
"""

import os
import re


KEPT = r"(LD_LIBRARY_|PYTHON)?PATH|HOME|TMPDIR|VIRTUAL_ENV|(PYTEST|CUDA|NVIDIA|OMP|MKL|ATEN|ONEDNN|OPENBLAS)_\w+"

for variable in set(os.environ):
    if not re.fullmatch(KEPT, variable):
        del os.environ[variable]
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one process per core computes already
