"""C++ sources of the CPU kernels, installed as `multibeta._csrc` and compiled on first use by `multibeta.kernels`."""
