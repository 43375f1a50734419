"""Models of diffusers are read from their folders."""

import json

import pytest
import torch
from torch import nn

from accelerated_models import unet
from multibeta import acceleration


def test_a_model_is_read_from_its_folder(tmp_path):
    unet().save_pretrained(tmp_path / "unet")
    model = acceleration.load(tmp_path / "unet", torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    with pytest.raises(ValueError, match="name one of its parts: unet"):
        acceleration.load(tmp_path)
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({"_class_name": "Nonsense"}))
    with pytest.raises(ValueError, match="names the class 'Nonsense'"):
        acceleration.load(tmp_path / "unet")
    with pytest.raises(ValueError, match="no inputs are known for a Linear"):
        acceleration.random_inputs(nn.Linear(2, 2))
