"""NeuroSteer: steer language models with vectors and neuron circuits built from examples in seconds.

The public names stand in `__init__.pyi`. They are loaded when first used, so that importing the package is fast and
touches nothing.
"""

import lazy_loader

from neurosteer.version import VERSION as __version__  # noqa: F401

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
