import multibeta
from multibeta import environment


def test_the_names_each_op_may_be_served_by():
    with multibeta.backend("sdpa", noise="reference"):
        assert environment.backends() == {
            "backend group_norm=": "auto, reference, triton, cpp; now auto",
            "backend attention=": "auto, reference, cpp, sdpa, xformers; now sdpa",
            "backend sampler=": "auto, reference, triton, cpp; now auto",
            "backend noise=": "auto, reference, cpp; now reference",
        }
    assert environment.backends()["backend attention="].endswith("; now auto")
