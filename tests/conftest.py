"""Every shape written in a signature is checked while the tests run."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")

from jaxtyping import install_import_hook

install_import_hook("ptr_hf", "beartype.beartype")
