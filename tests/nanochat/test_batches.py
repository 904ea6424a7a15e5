"""Rows become ids on the device through buffers that are used again."""

import numpy as np
import torch

from nanochat.batches import Batches

CPU = torch.device("cpu")


def test_ids_are_the_rows_whatever_their_type_and_number() -> None:
    batches = Batches(3, 5, device=CPU)
    for count, dtype in ((3, np.uint16), (1, np.uint32), (2, np.uint16), (7, np.uint32)):
        rows = np.random.default_rng(count).integers(0, 60_000, (count, 5)).astype(dtype)
        ids = batches.load(rows)
        assert ids.dtype == torch.long
        assert torch.equal(ids, torch.from_numpy(rows.astype(np.int64)))


def test_no_memory_is_taken_for_a_second_batch() -> None:
    batches = Batches(3, 5, device=CPU)
    first = batches.load(np.zeros((3, 5), np.uint16))
    assert batches.load(np.ones((2, 5), np.uint16)).data_ptr() == first.data_ptr()
