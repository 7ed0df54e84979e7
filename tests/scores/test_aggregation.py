"""What is remembered of episodes and stretches of them."""

import math
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from evidences import make_table, seeded
from lerobot.datasets import LeRobotDatasetMetadata

from ptr_hf.scores import WHOLE_EPISODE, EpisodeTable, SlotMemory


def metadata(points: Path) -> LeRobotDatasetMetadata:
    return LeRobotDatasetMetadata("tests/points", root=points)


def filled(
    lengths: tuple[int, ...], window: int = WHOLE_EPISODE, channels: int = 1, horizon: float = 32.0
) -> SlotMemory:
    table = make_table(lengths)
    memory = SlotMemory(table.num_episodes, table.num_slots(window), channels, window, horizon)
    memory.fill(table)
    return memory


class TestEpisodeTable:
    def test_of_a_real_dataset(self, points: Path) -> None:
        table = EpisodeTable.from_metadata(metadata(points), corrupted=[2])
        assert table.first.tolist() == [0, 30, 54, 94]
        assert table.length.tolist() == [30, 24, 40, 18]
        assert table.group.tolist() == [0, 0, 0, 0]
        assert table.corrupted.tolist() == [False, False, True, False]
        assert (table.num_episodes, table.num_tasks) == (4, 2)
        assert table.num_slots(WHOLE_EPISODE) == 4
        assert table.num_slots(8) == 4 + 3 + 5 + 3

    def test_grouped_by_task(self, points: Path) -> None:
        table = EpisodeTable.from_metadata(metadata(points), group_by="task")
        assert table.group.tolist() == [0, 1, 0, 1]

    def test_grouped_by_a_column(self, points: Path) -> None:
        meta = metadata(points)
        meta.episodes = meta.episodes.add_column("operator", ["zoe", "adam", "adam", "zoe"])
        assert EpisodeTable.from_metadata(meta, group_by="operator").group.tolist() == [1, 0, 0, 1]

    def test_a_column_that_is_not_there(self, points: Path) -> None:
        with pytest.raises(
            ValueError,
            match=r"standardize_by='operator' is no column.*choose all, task, or a column.*dataset_from_index.*length, tasks",
        ):
            EpisodeTable.from_metadata(metadata(points), group_by="operator")


class TestSlots:
    def test_an_episode_is_one_slot(self) -> None:
        memory = filled((30, 24, 40, 18))
        episode, index = torch.tensor([0, 0, 1, 2, 3]), torch.tensor([0, 29, 30, 93, 111])
        assert memory.slot(episode, index).tolist() == [0, 0, 1, 2, 3]

    def test_a_stretch_starts_anew_with_each_episode(self) -> None:
        memory = filled((30, 24, 40, 18), window=16)
        # episodes of 2, 2, 3 and 2 stretches
        assert memory.first_slot.tolist() == [0, 2, 4, 7]
        episode, index = torch.tensor([0, 0, 1, 1, 2, 3]), torch.tensor([15, 16, 30, 46, 93, 111])
        assert memory.slot(episode, index).tolist() == [0, 1, 2, 3, 6, 8]

    def test_a_stretch_belongs_to_its_episodes_group(self) -> None:
        table = make_table((30, 24), groups=(1, 0))
        memory = SlotMemory(2, table.num_slots(16), 1, 16)
        memory.fill(table)
        assert memory.group.tolist() == [1, 1, 0, 0]

    def test_a_chunk_past_the_end_stays_inside_the_table(self) -> None:
        memory = filled((30, 18), window=16)
        assert memory.slot(torch.tensor([1]), torch.tensor([30 + 90])).item() < len(memory.weight)


class TestMean:
    def test_it_is_a_mean_that_fades_with_every_visit(self) -> None:
        horizon, steps, slots = 5.0, 30, 3
        memory = filled((10, 10, 10), channels=2, horizon=horizon)
        total, count = np.zeros((slots, 2)), np.zeros((slots, 2))
        source = seeded(0)
        for _ in range(steps):
            slot = torch.randint(slots, (4,), generator=source)
            values = torch.randn(4, 2, generator=source)
            values[torch.rand(4, 2, generator=source) < 0.3] = torch.nan
            memory.remember(slot, values)
            for place in range(slots):
                for channel in range(2):
                    news = [float(v) for s, v in zip(slot, values[:, channel], strict=True) if s == place and v == v]
                    fade = (1 - 1 / horizon) ** len(news)
                    total[place, channel] = total[place, channel] * fade + sum(news)
                    count[place, channel] = count[place, channel] * fade + len(news)
        np.testing.assert_allclose(memory.mean.numpy(), total / count, rtol=1e-4, atol=1e-5)
        assert count.max() < horizon + 4

    def test_a_slot_without_a_verdict_is_unknown(self) -> None:
        memory = filled((10, 10, 10))
        memory.remember(torch.tensor([0, 0, 1]), torch.tensor([[1.0], [3.0], [math.nan]]))
        assert memory.mean[0].item() == 2.0
        assert memory.mean[1:].isnan().all()

    def test_old_verdicts_fade(self) -> None:
        memory = filled((10,), horizon=4.0)
        for value in (0.0,) * 20 + (1.0,) * 20:
            memory.remember(torch.tensor([0]), torch.tensor([[value]]))
        assert memory.mean.item() > 0.99

    def test_laying_out_again_forgets(self) -> None:
        memory = filled((10, 10))
        memory.remember(torch.tensor([0]), torch.tensor([[1.0]]))
        memory.weight.fill_(0.5)
        memory.fill(make_table((10, 10)))
        assert memory.mean.isnan().all()
        assert memory.weight.tolist() == [1.0, 1.0]

    def test_it_survives_a_state_dict(self) -> None:
        memory, other = filled((30, 24), window=8, channels=2), filled((30, 24), window=8, channels=2)
        memory.remember(torch.tensor([0, 3, 3]), torch.randn(3, 2, generator=seeded(1)))
        memory.weight.copy_(torch.rand(len(memory.weight), generator=seeded(2)))
        other.load_state_dict(memory.state_dict(), strict=True)
        for name, value in memory.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
        for each in (memory, other):
            each.remember(torch.tensor([3]), torch.ones(1, 2))
        torch.testing.assert_close(other.mean, memory.mean, rtol=0, atol=0, equal_nan=True)


def test_the_metadata_of_episodes_is_a_table(points: Path) -> None:
    assert isinstance(metadata(points).episodes, datasets.Dataset)
