"""What a run on one machine says of its speed."""

import pytest
import torch

from nanochat import progress as progress_module
from nanochat.progress import ProgressLog
from nanochat.settings import Settings


@pytest.mark.parametrize(("peak", "mfu"), [(2e12, "mfu=50.0% "), (None, "")])
def test_line_of_a_step_tells_rate_share_of_the_cards_arithmetic_and_time_left(
    peak: float | None,
    mfu: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    now_s = 100.0
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now_s)
    settings = Settings(total_batch_size=1000, max_seq_len=100, log_every=1, wandb_project="")
    log = ProgressLog(settings, num_steps=61, rank=0, token_flops=1e9, peak_flops=peak)
    now_s += 1.0
    log.step(1, torch.tensor(2000.0), 1.0, (0, 3, 5, 10))
    log.close()
    line = capsys.readouterr().out.strip()
    assert line == (
        f"step=1/61 loss=2.0000 lrm=1.000 tokens_per_s=1,000 {mfu}eta=1:00 "
        "epoch=0 shard=3 shard_progress=50.0%"
    )
