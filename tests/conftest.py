"""Settings of every test. The environment comes first: torch, triton and huggingface_hub read it when imported."""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")  # `make test-gpu` sets 0: kernels are compiled there
os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from a second thread and wait for it: 11 s instead of 109 s on two busy cores.
os.environ["OMP_NUM_THREADS"] = "1"

from bounds import watch_interpreter
from hypothesis import settings

# The first example of a property often pays for imports and caches: a limit per example would fail at random.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
watch_interpreter()  # kernels that leave their tensors fail
