"""Triton kernels, installed as `multibeta.kernels`: one file per op, importing torch and triton only."""

if __name__ == "kernels":
    raise ImportError(
        "`kernels` is the name of another package, which this folder must not shadow: "
        "import `multibeta.kernels`, and run `pytest`, not `python -m pytest`, in the repository root"
    )
