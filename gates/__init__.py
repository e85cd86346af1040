"""The parts inside the model: the PEFT method, the attention function, the cache of fixed size, its simulation."""

import peft  # noqa: F401  first: right after its import the method is registered, which imports modules of this package
