"""Files: what was written is read again as it was."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from cifar_lab.files import read_table, write_csv


def test_a_table_keeps_the_words_that_pandas_takes_for_nothing(tmp_path: Path) -> None:
    names = ["None", "NA", "null", "nan", "007", "1e3", "#N/A", " x"]
    rows = [{"trial_id": name, "epoch": 1, "val_loss": 0.5, "reason": None} for name in names]
    rows[0] |= {"val_loss": math.nan, "reason": "the loss is nan"}
    rows[1] |= {"val_loss": None}
    rows[2] |= {"val_loss": math.inf}
    write_csv(tmp_path / "a.csv", ("trial_id", "epoch", "val_loss", "reason"), rows)
    table = read_table(tmp_path / "a.csv", "trial_id", "reason", "not there")
    assert table.trial_id.tolist() == names
    assert table.epoch.dtype == np.int64 and table.val_loss.dtype == np.float64
    assert table.val_loss.isna().tolist() == [True, True, *[False] * 6] and table.val_loss[2] == math.inf
    assert table.reason[0] == "the loss is nan" and table.reason[1:].isna().all()
