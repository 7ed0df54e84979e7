"""Every shape written in a signature is checked while the tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jaxtyping import install_import_hook

# transformers' argument dataclasses change their own types after initialisation, so those modules stay unchecked
CHECKED = ("method", "policies", "data", "report", "modeling_ptr", "metrics", "scoring", "trainer", "hub")
install_import_hook([f"ptr_hf.{name}" for name in CHECKED], "beartype.beartype")
