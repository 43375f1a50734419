"""`check` tells what serves each block, and puts back those that are wrong."""

import pytest
import torch
from torch import nn

from accelerated_models import autoencoder, close, unet
from multibeta import acceleration
from multibeta.acceleration import TOLERANCES, blocks, check, report


class TestCheck:
    def test_rows_say_what_serves_each_block(self):
        model = unet()
        rows = {row.name: row for row in check(model, torch.randn(1, 3, 8, 8), 5, repetitions=1)}
        row = rows["mid_block.resnets.0"]
        assert row.accelerated and row.type == "ResnetBlock2D" and row.error <= TOLERANCES[torch.float32]
        assert row.before_ms > 0 and row.after_ms > 0 and "group_norm_act: " in row.path
        assert "attention: " in rows["mid_block.attentions.0"].path
        assert all(row.accelerated for row in rows.values())
        assert {row.name for row in report(model) if row.accelerated} == set(rows)
        text = acceleration.table(list(rows.values()))
        assert "mid_block.resnets.0 ResnetBlock2D: " in text and text.splitlines()[-1].startswith(f"{len(rows)} blocks: ")

    def test_a_block_that_fails_is_put_back_and_named(self, monkeypatch):
        model = unet()
        sound = blocks.attend
        monkeypatch.setattr(blocks, "attend", lambda *qkv: 1.5 * sound(*qkv))
        x = torch.randn(1, 3, 8, 8)
        expected = model(x, 5).sample
        rows = check(model, x, 5, repetitions=1)
        failed = {row.name: row for row in rows if not row.accelerated}
        assert set(failed) == {name for name, part in model.named_modules() if type(part).__name__ == "Attention"}
        assert all("differs from the original by" in row.reason for row in failed.values())
        attention = model.mid_block.attentions[0]
        assert type(attention.to_q) is nn.Linear and type(model.conv_in) is not nn.Conv2d
        close(model(x, 5).sample, expected)
        assert "left as it is, differs" in acceleration.table(rows)

    def test_a_block_that_raises_is_put_back(self, monkeypatch):
        def broken(*arguments):
            raise RuntimeError("no such kernel\nat all")

        monkeypatch.setattr(blocks, "attend", broken)
        rows = check(unet(), torch.randn(1, 3, 8, 8), 5, repetitions=1)
        assert {row.reason for row in rows if not row.accelerated} == {"no such kernel"}

    def test_hooks_of_others_count_for_neither_form(self):
        model = nn.Sequential(nn.Linear(4, 4))
        model[0].register_forward_hook(lambda module, args, output: 2 * output)
        (row,) = check(model, torch.randn(2, 4), repetitions=1)
        assert row.accelerated and row.error <= TOLERANCES[torch.float32]

    def test_no_repetitions_are_refused(self):
        with pytest.raises(ValueError, match="repetitions must be at least 1, got 0"):
            check(nn.Linear(2, 2), torch.randn(1, 2), repetitions=0)

    def test_modes_stay_and_blocks_not_met_are_named(self):
        model = autoencoder().train()
        model.decoder.eval()
        rows = check(model, torch.randn(1, 3, 16, 16), repetitions=1)
        assert model.encoder.training and not model.decoder.training
        assert not [row.reason for row in rows if not row.accelerated]
        rows = check(
            nn.ModuleDict({"a": nn.Linear(2, 2)}).apply(lambda m: setattr(m, "eval", lambda: lambda: None)), repetitions=1
        )
        assert [row.path for row in rows] == ["not run by these inputs"]
