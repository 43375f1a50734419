"""Kernels, installed as `multibeta.kernels`, importing torch and triton only: one file per op in Triton, `cpp` for the CPU.

`kernels` is the name of a package of Hugging Face too, which transformers and diffusers look for. Where the root of a checkout is
on sys.path this folder gives way to that package, and without it stands there empty, as a folder without modules would.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    root = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    elsewhere = [entry for entry in sys.path if os.path.realpath(entry) != root]
    found = importlib.machinery.PathFinder.find_spec("kernels", elsewhere)
    if found is not None and found.loader is not None and found.origin is not None:  # which a folder without modules has not
        sys.modules["kernels"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules["kernels"])
    else:
        __path__ = []  # our modules are none of `kernels`: loaded under both names they would register ops twice
        sys.modules[__name__].__file__ = None
