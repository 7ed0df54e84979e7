"""Each chunk is read with what was recorded of its own first frame, and an open dataset is read as its user opened it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from demonstrations import write_dataset
from lerobot.datasets import LeRobotDatasetMetadata, StreamingLeRobotDataset
from lerobot.datasets.language import LANGUAGE_PERSISTENT, language_feature_info
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from lerobot.transforms.transforms import GaussianNoise
from small_policies import base_policy, ptr_policy, stats_of
from torch.utils.data import ConcatDataset, Subset

from ptr_hf import PTRConfig, PTRPolicy, PTRTrainer, PTRTrainingArguments, score_dataset
from ptr_hf.data.datasets import open_dataset
from ptr_hf.data.in_memory import InMemorySegments, collate_segments
from ptr_hf.data.mixture.config import MixtureConfig, SourceConfig
from ptr_hf.data.mixture.dataset import Mixture
from ptr_hf.data.mixture.metadata import MixtureMetadata
from ptr_hf.data.mixture.streaming import StreamingMixture
from ptr_hf.data.segments import SegmentLayout, segment_rows, split_segment
from ptr_hf.processor_ptr import make_ptr_pre_post_processors
from ptr_hf.training.data_sources import read_metadata

CAMERA = "observation.image"
CHUNK = (0, 1, 2, 3)
LAYOUTS = {
    "futures": SegmentLayout(None, CHUNK, 4, 4, 4),
    "lone futures": SegmentLayout((-1, 0), CHUNK, 2, 3, 5),
    "no futures": SegmentLayout(None, CHUNK, 2, 4, None),
}
LENGTHS = (26, 13)
POINT = {
    "action": ["right_ee_x", "right_ee_y"],
    "state": ["right_ee_x", "right_ee_y", "environment_1", "environment_2"],
}
INSTRUCTIONS = ("pick", "move", "put")
SMALL = {"segment_length": 2, "queue_size": 32, "queue_negatives": 8, "scorer_warmup_steps": 1}


def instruction(frame: int) -> str:
    return INSTRUCTIONS[min(frame // 6, 2)]


@pytest.fixture(scope="module")
def changing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two episodes whose instruction changes at the frames 6 and 12, with columns of other kinds beside it."""
    root = tmp_path_factory.mktemp("datasets") / "changing"
    features = {
        "observation.state": {"dtype": "float32", "shape": (4,), "names": None},
        CAMERA: {"dtype": "image", "shape": (32, 32, 3), "names": ["height", "width", "channels"]},
        "action": {"dtype": "float32", "shape": (2,), "names": None},
        "phase": {"dtype": "int64", "shape": (2,), "names": None},
        "note": {"dtype": "string", "shape": (1,), "names": None},
    }
    dataset = LeRobotDataset.create("tests/changing", 10, features, root=root, use_videos=False)
    draws = np.random.default_rng(0)
    for length in LENGTHS:
        for frame in range(length):
            dataset.add_frame(
                {
                    "observation.state": draws.normal(size=4).astype(np.float32),
                    CAMERA: draws.integers(0, 255, (32, 32, 3), dtype=np.uint8),
                    "action": draws.normal(size=2).astype(np.float32),
                    "phase": np.array([frame // 5, frame]),
                    "note": f"at {frame}",
                    "task": instruction(frame),
                }
            )
        dataset.save_episode()
    dataset.finalize()
    return root


def mixture_of(*sources: dict[str, Any], streaming: bool = False) -> MixtureMetadata:
    given = [SourceConfig(**source) for source in sources]
    return MixtureMetadata.read(MixtureConfig(given, action_space="compact", streaming=streaming))


def arguments(folder: Path, **settings: Any) -> PTRTrainingArguments:
    given = {
        "preset": "ptr_calibrated",
        "max_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return PTRTrainingArguments(output_dir=str(folder), **{**given, **SMALL, **settings})


class TestEveryChunkHasItsOwn:
    @pytest.mark.full
    @pytest.mark.parametrize(("name", "episodes"), [("futures", [1]), ("lone futures", None), ("no futures", None)])
    def test_instruction_and_every_other_column(self, changing: Path, name: str, episodes: list[int] | None) -> None:
        layout = LAYOUTS[name]
        dataset = open_dataset(changing, layout, episodes=episodes)
        anchors = [0, 3, 5, len(dataset) - 14, len(dataset) - 9, len(dataset) - 1]
        batch = collate_segments([dataset[anchor] for anchor in anchors])
        length = [LENGTHS[episode] for episode in batch["episode_index"].tolist()]
        first = batch["frame_index"].tolist()
        frames = [
            min(frame + start, last - 1)
            for start in layout.chunk_starts
            for frame, last in zip(first, length, strict=True)
        ]
        segment = split_segment(batch, layout)
        assert segment.chunks["task"] == [instruction(frame) for frame in frames]
        names = dataset.meta.tasks.index
        assert [names[task] for task in segment.task.tolist()] == segment.chunks["task"]
        assert segment.chunks["frame_index"].tolist() == frames
        assert segment.chunks["phase"].tolist() == [[frame // 5, frame] for frame in frames]
        assert segment.chunks["note"] == [f"at {frame}" for frame in frames]
        torch.testing.assert_close(segment.chunks["timestamp"], torch.tensor(frames) / 10)
        memory = InMemorySegments(dataset, layout).__getitems__(anchors)
        assert list(memory) == list(batch)
        for key, value in batch.items():
            assert torch.equal(memory[key], value) if isinstance(value, torch.Tensor) else memory[key] == value, key
        rows = segment_rows(batch, layout)
        total = (layout.segment_length + len(layout.lone_futures)) * len(anchors)
        assert {len(value) for value in rows.values()} == {total}

    def test_an_item_is_still_lerobots(self, changing: Path) -> None:
        plain = LeRobotDataset("tests/changing", root=changing)
        item = open_dataset(changing, LAYOUTS["futures"])[4]
        assert item["task"] == plain[4]["task"]
        assert item["task_index"] == plain[4]["task_index"]
        own = open_dataset(changing, SegmentLayout(None, CHUNK, 1, 4, 4))[4]
        assert not [key for key in own if key.startswith("chunk.")], "a segment of one chunk has nothing to add"

    @pytest.mark.full
    def test_prompts_and_scores(self, changing: Path, tmp_path: Path) -> None:
        trainer = PTRTrainer(base_policy("smolvla", changing), arguments(tmp_path), changing)
        segments = trainer.train_dataset
        prompts = trainer._prepare_inputs(trainer.data_collator([segments[4]]))["observation.language.tokens"]
        later = trainer._prepare_inputs(trainer.data_collator([segments[8]]))["observation.language.tokens"]
        assert torch.equal(prompts[1], later[0])
        assert not torch.equal(prompts[0], prompts[1])
        scores = score_dataset(trainer.policy, changing, preprocessor=trainer.preprocessor, progress=False)
        assert scores.task.tolist() == [instruction(frame) for frame in scores.frame_index.tolist()]

    @pytest.mark.parametrize("in_memory", [False, pytest.param(True, marks=pytest.mark.full)])
    def test_in_a_mixture_under_its_own_name(self, changing: Path, in_memory: bool) -> None:
        layout = LAYOUTS["futures"]
        renamed = {"dataset": str(changing), "name": "a", "tasks": {"move": "carry"}, "embodiment": POINT}
        other = {"dataset": str(changing), "name": "b", "episodes": [1], "embodiment": POINT}
        meta = mixture_of(renamed, other)
        mixture = Mixture(meta, layout, in_memory=in_memory)
        # the first frame of the second source, two of the first source
        anchors, first = [39, 4, 0], [0, 4, 0]
        expected = [[instruction(frame + start) for frame in first] for start in layout.chunk_starts]
        for chunk in expected:
            chunk[1:] = [task.replace("move", "carry") for task in chunk[1:]]
        segment = split_segment(mixture.__getitems__(anchors), layout)
        assert segment.chunks["task"] == [task for chunk in expected for task in chunk]
        assert [meta.tasks.index[task] for task in segment.task.tolist()] == segment.chunks["task"]
        alone = split_segment(collate_segments([mixture[4]]), layout)
        assert alone.chunks["task"] == [chunk[1] for chunk in expected]

    def test_in_a_stream(self, changing: Path) -> None:
        layout = LAYOUTS["futures"]
        meta = mixture_of({"dataset": str(changing), "embodiment": POINT}, streaming=True)
        stream = iter(StreamingMixture(meta, layout))
        for _ in range(6):
            segment = split_segment(collate_segments([next(stream)]), layout)
            own = [instruction(frame) for frame in segment.chunks["frame_index"].tolist()]
            assert segment.chunks["task"] == own

    def test_lerobots_training_loop_is_refused(self, changing: Path, points: Path, tmp_path: Path) -> None:
        """LeRobot's factory hands a policy the metadata of the data that its own loop reads."""
        meta = LeRobotDatasetMetadata("tests/changing", root=changing)

        def built(length: int, meta: LeRobotDatasetMetadata) -> PTRPolicy:
            config = PTRConfig(device="cpu", preset="ptr", **SMALL | {"segment_length": length}, num_belief_tokens=2)
            return PTRPolicy(config, base_policy=base_policy("act", points), dataset_meta=meta)

        message = r"2 episodes of tests/changing change their instruction.*--policy.segment_length=1"
        with pytest.raises(ValueError, match=message):
            built(2, meta)
        built(1, meta)
        built(2, LeRobotDatasetMetadata("tests/points", root=points)).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            PTRPolicy.from_pretrained(tmp_path, dataset_meta=meta)


def half(frames: torch.Tensor) -> torch.Tensor:
    assert frames.is_floating_point()
    return frames * 0.5


TRANSFORMS: dict[str, Callable] = {
    "half": half,
    "noise": GaussianNoise(),
    "outside [0, 1]": lambda frames: frames * 3 - 1,
}


class TestImageTransforms:
    @pytest.mark.full
    @pytest.mark.parametrize("name", TRANSFORMS)
    @pytest.mark.parametrize("kind", ["points", "point_videos"])
    def test_see_what_lerobot_shows_them(self, kind: str, name: str, request: pytest.FixtureRequest) -> None:
        root, layout = request.getfixturevalue(kind), LAYOUTS["futures"]
        offsets = layout.delta_timestamps([CAMERA, "action"], 10)
        given = LeRobotDataset("tests/points", root=root, image_transforms=TRANSFORMS[name], delta_timestamps=offsets)
        ours = open_dataset(given, layout)
        memory = InMemorySegments(ours, layout)
        for read in (lambda: ours[7][CAMERA], lambda: memory[7][CAMERA]):
            torch.manual_seed(3)
            expected = given[7][CAMERA]
            torch.manual_seed(3)
            assert torch.equal(read(), expected)

    def test_one_draw_a_sample_in_memory_too(self, points: Path) -> None:
        layout = LAYOUTS["futures"]
        given = LeRobotDataset("tests/points", root=points, image_transforms=lambda frames: frames * 0 + torch.rand(()))
        ours = open_dataset(given, layout)
        torch.manual_seed(3)
        expected = torch.stack([ours[place][CAMERA] for place in (0, 40)])
        torch.manual_seed(3)
        assert torch.equal(InMemorySegments(ours, layout).__getitems__([0, 40])[CAMERA], expected)
        assert len(expected.unique()) == 2

    @pytest.mark.parametrize("in_memory", [False, True])
    def test_the_policy_sees_what_they_leave(self, point_videos: Path, tmp_path: Path, in_memory: bool) -> None:
        given = LeRobotDataset("tests/points", root=point_videos, image_transforms=half)
        trainer = PTRTrainer(base_policy("act", point_videos), arguments(tmp_path, in_memory=in_memory), given)
        trainer.preprocessor.steps = []
        (batch,) = torch.utils.data.DataLoader(
            Subset(trainer.train_dataset, [5]), batch_size=4, collate_fn=trainer.data_collator
        )
        assert torch.equal(trainer._prepare_inputs(batch)[CAMERA][0], given[5][CAMERA])

    def test_a_transform_of_8_bit_frames_gets_8_bit_frames(self, point_videos: Path) -> None:
        given = LeRobotDataset(
            "tests/points", root=point_videos, image_transforms=lambda frames: 255 - frames, return_uint8=True
        )
        layout = LAYOUTS["futures"]
        ours = open_dataset(given, layout)
        assert ours[7][CAMERA].dtype == torch.uint8
        assert torch.equal(ours[7][CAMERA][0], given[7][CAMERA])
        assert torch.equal(InMemorySegments(ours, layout)[7][CAMERA], ours[7][CAMERA])

    def test_given_later(self, point_videos: Path) -> None:
        ours = open_dataset(point_videos, LAYOUTS["futures"])
        plain = ours[7][CAMERA]
        ours.set_image_transforms(half)
        assert torch.equal(ours[7][CAMERA], plain.float() / 255 * 0.5)
        ours.clear_image_transforms()
        assert torch.equal(ours[7][CAMERA], plain.float() / 255)

    @pytest.mark.parametrize("in_memory", [False, pytest.param(True, marks=pytest.mark.full)])
    def test_in_a_mixture_all_frames_are_floats(self, points: Path, point_videos: Path, in_memory: bool) -> None:
        layout = LAYOUTS["futures"]
        transformed = LeRobotDataset("tests/points", root=points, image_transforms=lambda frames: frames * 3 - 1)
        videos = LeRobotDataset("tests/points", root=point_videos)
        given = [
            {"dataset": one, "name": name, "embodiment": POINT} for one, name in ((transformed, "a"), (videos, "b"))
        ]
        batch = Mixture(mixture_of(*given), layout, in_memory=in_memory).__getitems__([7, 112 + 7])[CAMERA]
        assert torch.equal(batch[0, 0], transformed[7][CAMERA])
        assert torch.equal(batch[1, 0], videos[7][CAMERA])


class TestAnOpenDataset:
    def test_what_it_was_opened_with_is_kept(self, point_videos: Path) -> None:
        given = LeRobotDataset(
            "tests/points",
            root=point_videos,
            episodes=[2, 0],
            tolerance_s=0.03,
            revision="v2",
            video_backend="video_reader",
            depth_output_unit="m",
            delta_timestamps={"action": [0, 5]},
        )
        given.meta.tasks = given.meta.tasks.rename({"reach the goal": "reach it"})
        given.meta.stats["action"]["mean"] += 1
        ours = open_dataset(given, LAYOUTS["futures"])
        assert ours.meta is given.meta
        assert (ours.root, ours.revision, ours.episodes, ours.tolerance_s) == (given.root, "v2", [2, 0], 0.03)
        assert (ours._video_backend, ours.depth_output_unit) == ("video_reader", "m")
        assert ours[0]["action"].shape == (16, 2)
        assert ours[0]["task"] == given[0]["task"]
        memory = InMemorySegments(ours, LAYOUTS["futures"])
        assert torch.equal(memory[3][CAMERA], ours[3][CAMERA])

    def test_a_tolerance_is_kept_in_memory_and_in_mixtures(self, point_videos: Path) -> None:
        given = LeRobotDataset("tests/points", root=point_videos, tolerance_s=0.03)
        meta = mixture_of({"dataset": given, "embodiment": POINT})
        assert Mixture(meta, LAYOUTS["futures"]).datasets[0].tolerance_s == 0.03

    @pytest.mark.full
    @pytest.mark.parametrize("edit", ["filter", "map", "select"])
    def test_rows_changed_in_memory_are_refused(self, changing: Path, edit: str) -> None:
        given = LeRobotDataset("tests/changing", root=changing)
        rows = given.hf_dataset
        given.reader.hf_dataset = {
            "filter": lambda: rows.filter(lambda row: row["frame_index"] < 5),
            "map": lambda: rows.map(lambda row: {"action": row["action"] * 2}),
            "select": lambda: rows.select(range(20)),
        }[edit]()
        for episodes in (None, [0]):
            with pytest.raises(ValueError, match=r"rows of the open dataset tests/changing are not those of its files"):
                open_dataset(given, LAYOUTS["futures"], episodes=episodes)

    @pytest.mark.full
    def test_other_files_that_came_into_the_folder_do_no_harm(self, tmp_path: Path) -> None:
        root = write_dataset(tmp_path / "whole", (6, 6), cameras=(), file_an_episode=True)
        last = max((root / "data").rglob("*.parquet"))
        kept = last.rename(tmp_path / last.name)
        given = LeRobotDataset("tests/points", root=root, episodes=[0])
        kept.rename(last)
        assert len(open_dataset(given, LAYOUTS["no futures"])) == 6

    @pytest.mark.full
    def test_a_subclass(self, points: Path) -> None:
        class Convenient(LeRobotDataset):
            def __init__(self) -> None:
                super().__init__("tests/points", root=points)

        class Mirrored(LeRobotDataset):
            def __getitem__(self, idx: int) -> Any:
                return {key: -value for key, value in super().__getitem__(idx).items() if key == "action"}

        assert len(open_dataset(Convenient(), LAYOUTS["futures"])) == 112
        with pytest.raises(ValueError, match=r"Mirrored changes how a LeRobotDataset is read \(__getitem__\)"):
            open_dataset(Mirrored("tests/points", root=points), LAYOUTS["futures"])

    def test_one_that_is_being_recorded(self, tmp_path: Path) -> None:
        features = {"action": {"dtype": "float32", "shape": (2,), "names": None}}
        recording = LeRobotDataset.create("tests/new", 10, features, root=tmp_path / "new", use_videos=False)
        for frame in range(12):
            recording.add_frame({"action": np.full(2, frame, dtype=np.float32), "task": "wait"})
        recording.save_episode()
        with pytest.raises(ValueError, match=r"tests/new is still being recorded: call its finalize\(\) first"):
            open_dataset(recording, LAYOUTS["no futures"])
        recording.finalize()
        assert open_dataset(recording, LAYOUTS["no futures"])[3]["action"][0, 0] == 3

    def test_another_revision_is_refused(self, points: Path, tmp_path: Path) -> None:
        given = LeRobotDataset("tests/points", root=points, revision="v2")
        args = arguments(tmp_path, dataset_revision="v1")
        with pytest.raises(
            ValueError, match=r"Revision 'v1' was asked for, but the dataset tests/points is open at 'v2'"
        ):
            read_metadata(given, args)
        with pytest.raises(ValueError, match=r"Revision 'v1' was asked for"):
            MixtureConfig.of([{"dataset": given, "revision": "v1"}])


class TestOtherKindsOfDataset:
    def test_each_is_refused_with_what_to_give_instead(self, points: Path, tmp_path: Path) -> None:
        given = LeRobotDataset("tests/points", root=points)
        wrong = {
            r"A StreamingLeRobotDataset cannot be read .*'streaming': True": StreamingLeRobotDataset(
                "tests/points", root=points
            ),
            r"A Subset picks frames.*episodes=\[...\]": Subset(given, [1, 2]),
            r"A ConcatDataset is not read: give the list of its datasets": ConcatDataset([given, given]),
            r"The metadata of tests/points alone is no dataset": given.meta,
            r"A Dataset is no dataset that PTR reads": given.hf_dataset,
            r"A int is no dataset that PTR reads": 3,
        }
        for message, source in wrong.items():
            for read in (
                lambda source=source: read_metadata(source, arguments(tmp_path)),
                lambda source=source: open_dataset(source, LAYOUTS["futures"]),
                lambda source=source: MixtureConfig.of([given, source]),
            ):
                with pytest.raises(ValueError, match=message):
                    read()


@pytest.fixture(scope="module")
def annotated(points: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The points with LeRobot's language columns, as its annotation pipeline writes them."""
    root = tmp_path_factory.mktemp("datasets") / "annotated"
    shutil.copytree(points, root)
    fields = {"role": pa.string(), "content": pa.string(), "style": pa.string(), "timestamp": pa.float32()}
    kind = pa.list_(pa.struct({**fields, "camera": pa.string(), "tool_calls": pa.list_(pa.string())}))
    for file in (root / "data").rglob("*.parquet"):
        table = pq.read_table(file)
        said = {
            "role": "user",
            "content": "go",
            "style": "subtask",
            "timestamp": 0.0,
            "camera": None,
            "tool_calls": None,
        }
        column = pa.array([[said] * (place % 3) for place in range(len(table))], kind)
        pq.write_table(table.append_column(LANGUAGE_PERSISTENT, column), file)
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][LANGUAGE_PERSISTENT] = language_feature_info()[LANGUAGE_PERSISTENT]
    (root / "meta" / "info.json").write_text(json.dumps(info))
    return root


class TestLanguageColumns:
    @pytest.mark.full
    def test_are_scored_as_they_are_trained(self, annotated: Path, points: Path, tmp_path: Path) -> None:
        policy = ptr_policy("act", points, num_belief_tokens=0, **SMALL)
        preprocessor, _ = make_ptr_pre_post_processors(policy.config, stats_of(points))
        expected = score_dataset(policy, points, preprocessor=preprocessor, progress=False)
        layout = policy.config.layout
        for source in (annotated, InMemorySegments(open_dataset(annotated, layout), layout)):
            scores = score_dataset(policy, source, preprocessor=preprocessor, progress=False)
            np.testing.assert_array_equal(scores.loss, expected.loss)

    def test_in_a_mixture(self, annotated: Path) -> None:
        layout = LAYOUTS["futures"]
        mixture = Mixture(mixture_of({"dataset": str(annotated), "embodiment": POINT}), layout)
        assert len(mixture[3]["chunk.task"]) == 4
