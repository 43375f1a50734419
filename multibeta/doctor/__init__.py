"""What is wrong with a training, and what to do: each diagnosis is one small function of a log or of a measured model.

`examine` reads the logs of a run (`logs.py`) and measures its model (`measured.py`), and asks every diagnosis of `of_logs.py` and
`of_models.py`. Another one is a function that returns a `Finding` or None, and its name in the tuple at the end of its module.
"""

from multibeta.doctor.examination import Examination, examine
from multibeta.doctor.finding import Finding
from multibeta.doctor.logs import Log, read_log, read_logs
from multibeta.doctor.measured import Measured, measure
from multibeta.doctor.of_logs import OF_LOGS
from multibeta.doctor.of_models import OF_MODELS

__all__ = ["examine", "Examination", "Finding", "Log", "read_log", "read_logs", "Measured", "measure", "OF_LOGS", "OF_MODELS"]
